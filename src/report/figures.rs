//! The charts of a report: what each shows and how it was computed.

use super::svg::{Axis, Bar, Chart, Marks, SERIES, STYLE, count, half_distance, nice_ceil, short};
use super::{Report, group_index};
use crate::analysis::{
    ActivationStats, COSINE_BINS, Group, Histogram, LatentScaling, LatentStats, RELATIVE_NORM_BINS, finite, group_name,
};

/// Points of a curve beyond which it is thinned: each of half as many stretches keeps its lowest and highest point.
const MAX_POINTS: usize = 1000;

/// The classes of A only, shared, B only.
const GROUP_CLASSES: [&str; 3] = ["c0", "c2", "c1"];

/// What the original logs: name, title, label of the axis, meaning.
pub(super) const CURVES: [(&str, &str, &str, &str); 7] = [
    (
        "loss",
        "Loss",
        "loss",
        "l2_loss + l1_coeff · l1_loss of each logged step's batch, the coefficient being that \
    step's",
    ),
    (
        "l2_loss",
        "Reconstruction loss",
        "l2_loss",
        "The squared error of the reconstruction, summed over models and dimensions, mean over the batch",
    ),
    (
        "l1_loss",
        "Sparsity loss",
        "l1_loss",
        "Activations times the latent's total decoder norm, summed over latents, mean over the batch",
    ),
    ("l0_loss", "L0", "latents above zero", "The number of latents above zero, mean over the batch"),
    (
        "explained_variance",
        "Explained variance",
        "explained variance",
        "1 - squared error / squared distance from the batch's mean, mean over the rows of the batch; of all models \
         together and of each",
    ),
    ("l1_coeff", "l1 coefficient", "l1_coeff", "The coefficient of the sparsity loss"),
    ("lr", "Learning rate", "lr", "The learning rate as logged, after the scheduler's step"),
];

/// A chart with the words that explain it.
#[derive(Clone, Debug)]
pub struct Figure {
    /// What a file of it is called, without an ending.
    pub name: String,
    /// What it shows.
    pub title: String,
    /// How it was computed, how to read it.
    pub caption: String,
    /// The counts it draws, by their names in the JSON; none for curves.
    pub histograms: Vec<(String, Histogram)>,
    pub(super) section: Section,
    chart: Chart,
}

/// The part of the page in which a figure stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Section {
    Weights,
    Activations,
    Training,
}

impl Figure {
    /// The chart as an SVG file for a paper, styles inside.
    pub fn to_svg(&self) -> String {
        self.chart.svg(&self.name, &self.title, &self.caption, Some(STYLE))
    }

    /// The chart as an element of the page.
    pub(super) fn inline(&self) -> String {
        self.chart.svg(&self.name, &self.title, &self.caption, None)
    }
}

pub(super) fn all(report: &Report) -> Vec<Figure> {
    let mut out = vec![];
    if report.is_pair() {
        out.push(relative_norms(report));
    }
    out.push(decoder_norms(report));
    if report.is_pair() {
        out.push(cosines(report));
    } else if report.norms.n_models() > 2 {
        out.push(relative_norms_of_many(report));
    }
    if let Some(stats) = &report.activations {
        out.push(density(report, stats));
        out.push(l0(stats));
        out.extend(strengths(stats));
        if report.is_pair() {
            out.push(nu(report, stats, "nu_reconstruction", LatentScaling::nu_reconstruction));
            out.push(nu(report, stats, "nu_error", LatentScaling::nu_error));
        }
    }
    out.extend(training(report));
    out
}

fn bars(histogram: &Histogram, what: &str, class: impl Fn(f64) -> &'static str) -> Vec<Bar> {
    let bar = |(bin, &n): (usize, &u64)| {
        let (from, to) = histogram.edges(bin);
        let says = format!("{} to {}: {} {what}", short(from), short(to), count(n));
        Bar { from, to, count: n, class: class((from + to) / 2.0), says }
    };
    histogram.counts.iter().enumerate().map(bar).collect()
}

fn highest<'a>(histograms: impl IntoIterator<Item = &'a Histogram>) -> u64 {
    histograms.into_iter().flat_map(|h| &h.counts).copied().max().unwrap_or(0)
}

fn relative_norms(report: &Report) -> Figure {
    let (low, high) = (report.thresholds.low(), report.thresholds.high());
    let values = report.latents().filter_map(|h| report.norms.relative_norm(h));
    let histogram = Histogram::new(0.0, 1.0, RELATIVE_NORM_BINS, values);
    let class = |r| GROUP_CLASSES[group_index(Some(report.thresholds.group(r)))];
    let (a, b) = (&report.names[0], &report.names[1]);
    let sizes = report.group_sizes();
    let chart = Chart {
        x: Axis::linear("relative decoder norm", 0.0, 1.0, 4),
        y: Axis::counts("number of latents", highest([&histogram]), false),
        series: vec![("", Marks::Bars(bars(&histogram, "latents", class)))],
        legend: ["A only", "shared", "B only"].map(str::to_owned).into_iter().zip(GROUP_CLASSES).collect(),
        rules: vec![low, high],
    };
    Figure {
        name: "relative_decoder_norm".into(),
        title: "Relative decoder norm".into(),
        caption: format!(
            "‖W_dec[h,B]‖ / (‖W_dec[h,A]‖ + ‖W_dec[h,B]‖) of each latent h, A being {a}, B {b}: 0 where only A has the \
             latent, 1 where only B has it. {RELATIVE_NORM_BINS} bins over [0, 1]. Dashed: the thresholds {low} and \
             {high}. A only {}, \
             shared {}, B only {}; {} without a direction (both decoder vectors zero, or not finite) are not drawn.",
            count(sizes[0]),
            count(sizes[1]),
            count(sizes[2]),
            count(sizes[3])
        ),
        histograms: vec![("relative_decoder_norm".into(), histogram)],
        section: Section::Weights,
        chart,
    }
}

/// Histograms as outlines, one a model, with a legend.
fn outlines(report: &Report, key: &str, histograms: &[Histogram]) -> (Chart, Vec<(String, Histogram)>) {
    let class = |m: usize| SERIES[m % SERIES.len()];
    let chart = Chart {
        x: Axis::linear(key, histograms[0].low, histograms[0].high, 4),
        y: Axis::counts("number of latents", highest(histograms), true),
        series: histograms.iter().enumerate().map(|(m, h)| (class(m), Marks::Steps(h.clone()))).collect(),
        legend: (0..histograms.len().min(6)).map(|m| (report.letter(m), class(m))).collect(),
        rules: vec![],
    };
    let name = |m: usize| format!("{}_{}", key.replace(' ', "_"), report.letter(m));
    (chart, histograms.iter().enumerate().map(|(m, h)| (name(m), h.clone())).collect())
}

fn decoder_norms(report: &Report) -> Figure {
    let models = 0..report.norms.n_models();
    let of = |m: usize| report.latents().map(move |h| report.norms.norms(h)[m]);
    let max = models.clone().flat_map(of).filter(|v| v.is_finite()).fold(0.0, f64::max);
    let histograms: Vec<_> = models.map(|m| Histogram::new(0.0, nice_ceil(max), 100, of(m))).collect();
    let (chart, named) = outlines(report, "decoder norm", &histograms);
    Figure {
        name: "decoder_norm".into(),
        title: "Decoder norms".into(),
        caption: format!(
            "‖W_dec[h,m]‖ of each latent h in each model m ({}), the Euclidean norm, computed in float64 from the \
             stored weights. 100 bins from 0.",
            (0..report.names.len())
                .map(|m| format!("{}: {}", report.letter(m), report.names[m]))
                .collect::<Vec<_>>()
                .join(", ")
        ),
        histograms: named,
        section: Section::Weights,
        chart,
    }
}

fn relative_norms_of_many(report: &Report) -> Figure {
    let of = |m: usize| report.latents().filter_map(move |h| report.norms.relative(h, m));
    let models = 0..report.norms.n_models();
    let histograms: Vec<_> = models.map(|m| Histogram::new(0.0, 1.0, RELATIVE_NORM_BINS, of(m))).collect();
    let (chart, named) = outlines(report, "relative decoder norm", &histograms);
    Figure {
        name: "relative_decoder_norm".into(),
        title: "Relative decoder norms".into(),
        caption: format!(
            "‖W_dec[h,m]‖ / Σ_m ‖W_dec[h,m]‖ of each latent h for each model m: each model's share of the latent. \
             {RELATIVE_NORM_BINS} bins over [0, 1]."
        ),
        histograms: named,
        section: Section::Weights,
        chart,
    }
}

fn cosines(report: &Report) -> Figure {
    let shared = report.latents().filter(|&h| report.group(h) == Some(Group::Shared));
    let histogram = Histogram::new(-1.0, 1.0, COSINE_BINS, shared.filter_map(|h| report.norms.cosine(h)));
    let chart = Chart {
        x: Axis::linear("cosine similarity", -1.0, 1.0, 4),
        y: Axis::counts("number of latents", highest([&histogram]), true),
        series: vec![("", Marks::Bars(bars(&histogram, "latents", |_| "c2")))],
        legend: vec![],
        rules: vec![],
    };
    Figure {
        name: "cosine".into(),
        title: "Cosine similarity of shared latents' decoder vectors".into(),
        caption: format!(
            "⟨W_dec[h,A], W_dec[h,B]⟩ / (‖W_dec[h,A]‖ · ‖W_dec[h,B]‖) of the {} shared latents (relative decoder norm \
             between {} and {}): 1 where both models have the same direction. {COSINE_BINS} bins over [-1, 1], counts \
             on a log scale.",
            count(histogram.total()),
            report.thresholds.low(),
            report.thresholds.high()
        ),
        histograms: vec![("cosine_of_shared".into(), histogram)],
        section: Section::Weights,
        chart,
    }
}

fn density(report: &Report, stats: &ActivationStats) -> Figure {
    let decades = (stats.rows as f64).log10().ceil().max(1.0);
    let fired = report.latents().filter(|&h| stats.latents[h].fired > 0);
    let histogram = Histogram::new(-decades, 0.0, 10 * decades as usize, fired.map(|h| stats.density(h).log10()));
    let says = |bar: Bar| {
        let (from, to) = (short(10f64.powf(bar.from)), short(10f64.powf(bar.to)));
        Bar { says: format!("{from} to {to}: {} latents", count(bar.count)), ..bar }
    };
    let bars = bars(&histogram, "latents", |_| "c3").into_iter().map(says);
    let chart = Chart {
        x: Axis::of_log10("firing density: share of rows (log scale)", -decades, 0.0),
        y: Axis::counts("number of latents", highest([&histogram]), false),
        series: vec![("", Marks::Bars(bars.collect()))],
        legend: vec![],
        rules: vec![],
    };
    Figure {
        name: "density".into(),
        title: "Firing density".into(),
        caption: format!(
            "The share of the {} rows on which each latent is above zero. Ten bins a decade. {} dead latents, which \
             fire on no row, are not drawn.",
            count(stats.rows),
            count(stats.dead())
        ),
        histograms: vec![("log10_density".into(), histogram)],
        section: Section::Activations,
        chart,
    }
}

fn l0(stats: &ActivationStats) -> Figure {
    let values = stats.l0.len() as f64;
    // Whole numbers a bin, at most 100 bins.
    let width = nice_ceil((values / 100.0).max(1.0)).ceil();
    let bins = (values / width).ceil().max(1.0);
    let mut histogram = Histogram::new(0.0, bins * width, bins as usize, []);
    stats.l0.iter().enumerate().for_each(|(k, &n)| histogram.counts[k / width as usize] += n);
    let says = |bar: Bar| {
        let last = bar.to as u64 - 1;
        let range = if width > 1.0 { format!("{} to {}", bar.from, count(last)) } else { bar.from.to_string() };
        Bar { says: format!("L0 of {range}: {} rows", count(bar.count)), ..bar }
    };
    let chart = Chart {
        x: Axis::linear("L0: latents above zero on a row", 0.0, bins * width, 4),
        y: Axis::counts("number of rows", highest([&histogram]), false),
        series: vec![("", Marks::Bars(bars(&histogram, "rows", |_| "c3").into_iter().map(says).collect()))],
        legend: vec![],
        rules: vec![],
    };
    let total: f64 = stats.l0.iter().enumerate().map(|(k, &n)| k as f64 * n as f64).sum();
    Figure {
        name: "l0".into(),
        title: "L0".into(),
        caption: format!(
            "How many latents are above zero on each of the {} rows; {} on average. {} a bin.",
            count(stats.rows),
            short(total / stats.rows as f64),
            if width > 1.0 { format!("{width} values") } else { "One value".into() }
        ),
        histograms: vec![("l0".into(), histogram)],
        section: Section::Activations,
        chart,
    }
}

/// None if no latent fires.
fn strengths(stats: &ActivationStats) -> Option<Figure> {
    let firing = || stats.latents.iter().filter(|l| l.fired > 0);
    let means = || firing().filter_map(LatentStats::mean_when_active).map(f64::log10);
    let maxima = || firing().map(|l| l.max.log10());
    let low = means().filter_map(finite).reduce(f64::min)?.floor();
    let high = maxima().filter_map(finite).reduce(f64::max)?.ceil().max(low + 1.0);
    let of = |values: &mut dyn Iterator<Item = f64>| Histogram::new(low, high, 20 * (high - low) as usize, values);
    let histograms = [of(&mut means()), of(&mut maxima())];
    let series = [("mean", "c3"), ("maximum", "c4")];
    let chart = Chart {
        x: Axis::of_log10("activation (log scale)", low, high),
        y: Axis::counts("number of latents", highest(&histograms), false),
        series: series.iter().zip(&histograms).map(|((_, class), h)| (*class, Marks::Steps(h.clone()))).collect(),
        legend: series.map(|(name, class)| (name.to_owned(), class)).to_vec(),
        rules: vec![],
    };
    Some(Figure {
        name: "activation".into(),
        title: "Mean and maximal activation".into(),
        caption: format!(
            "Of each of the {} latents that fire: the mean over the rows on which it is above zero, and the maximum. 20 \
             bins a decade.",
            count(firing().count() as u64)
        ),
        histograms: ["log10_mean_when_active", "log10_max"].map(str::to_owned).into_iter().zip(histograms).collect(),
        section: Section::Activations,
        chart,
    })
}

fn nu(report: &Report, stats: &ActivationStats, name: &str, of: fn(&LatentScaling) -> Option<f64>) -> Figure {
    let histogram = |group: Group| {
        let members = report.latents().filter(|&h| report.group(h) == Some(group));
        let values = members.filter_map(|h| stats.scaling(&report.norms, h).as_ref().and_then(of));
        Histogram::new(-0.5, 1.5, 80, values)
    };
    let groups = [Group::AOnly, Group::Shared, Group::BOnly];
    let histograms = groups.map(histogram);
    let outside: u64 = histograms.iter().map(|h| h.outside).sum();
    let total: u64 = histograms.iter().map(|h| h.total() + h.outside).sum();
    let chart = Chart {
        x: Axis::linear(&name.replace('_', " ").replace("nu", "ν"), -0.5, 1.5, 4),
        y: Axis::counts("number of latents", highest(&histograms), true),
        // The exclusive ones over the shared ones.
        series: [1, 0, 2]
            .into_iter()
            .filter(|&g| histograms[g].total() > 0)
            .map(|g| (GROUP_CLASSES[g], Marks::Steps(histograms[g].clone())))
            .collect(),
        legend: groups.iter().zip(GROUP_CLASSES).map(|(g, class)| (group_name(Some(*g)).to_owned(), class)).collect(),
        rules: vec![0.0, 1.0],
    };
    let (title, target, meaning) = if name == "nu_error" {
        (
            "Latent Scaling: ν error",
            "the error that model m's reconstruction leaves without the latent, x - (rec - f · d_m)",
            "the other model has the concept, but its decoder vector was shrunk away",
        )
    } else {
        (
            "Latent Scaling: ν reconstruction",
            "model m's reconstruction rec",
            "the other model has the concept in other latents",
        )
    };
    Figure {
        name: name.into(),
        title: title.into(),
        caption: format!(
            "For each of the {} latents that fire and have a direction: β_m = argmin Σ ‖β · f · d - y_m‖², f being the \
             latent's activation, d its longer decoder vector, y_m {target}. ν = β of the other model / β of the model that has d. About 0: \
             the other model lacks it. About 1 in an exclusive latent: an artifact, {meaning}. 80 bins over \
             [-0.5, 1.5]; {} latents lie outside. Minder et al. 2025, arXiv 2504.02922.",
            count(total),
            count(outside)
        ),
        histograms: ["A_only", "shared", "B_only"]
            .map(|group| format!("{name}_of_{group}"))
            .into_iter()
            .zip(histograms)
            .collect(),
        section: Section::Activations,
        chart,
    }
}

fn training(report: &Report) -> Vec<Figure> {
    let Some(log) = &report.training else { return vec![] };
    let mut out = Vec::new();
    let mut taken: Vec<&str> = Vec::new();
    for (key, title, label, meaning) in CURVES {
        let curves: Vec<&(String, Vec<f64>)> = log
            .curves
            .iter()
            .filter(|(name, _)| name == key || (key == "explained_variance" && name.starts_with("explained_variance_")))
            .collect();
        taken.extend(curves.iter().map(|(name, _)| name.as_str()));
        out.extend(curve_figure(&log.steps, key, title, label, meaning, &curves));
    }
    for curve in log.curves.iter().filter(|(name, _)| !taken.contains(&name.as_str())) {
        let figure = curve_figure(&log.steps, &curve.0, &curve.0, &curve.0, "As logged", &[curve]);
        out.extend(figure.map(|mut figure| {
            // Names that differ in signs only are told apart.
            while out.iter().any(|other: &Figure| other.name == figure.name) {
                figure.name.push('_');
            }
            figure
        }));
    }
    out
}

fn curve_figure(
    steps: &[f64],
    key: &str,
    title: &str,
    label: &str,
    meaning: &str,
    curves: &[&(String, Vec<f64>)],
) -> Option<Figure> {
    let finite_values = || curves.iter().flat_map(|(_, values)| values).copied().filter(|v| v.is_finite());
    let low = finite_values().reduce(f64::min)?;
    let high = finite_values().reduce(f64::max)?;
    let log = low > 0.0 && high / low > 20.0 && key != "lr" && key != "l1_coeff";
    let y = if log {
        Axis::log(&format!("{label} (log scale)"), low / 1.1, (high * 1.1).min(f64::MAX))
    } else if key.starts_with("explained_variance") {
        // The first steps may lie far below 0, where nobody looks.
        Axis::linear(label, low.clamp(-1.0, 0.0), 1.0, 4)
    } else {
        let low = low.min(0.0);
        let half = half_distance(low, high);
        let step = nice_ceil(half / 2.0);
        let high = low + (step * (half / (step / 2.0)).ceil()).max(step);
        Axis::linear(label, low, high.min(f64::MAX), 4)
    };
    let clipped = key.starts_with("explained_variance") && low < -1.0;
    let class = |i: usize| if curves.len() > 1 { ["c2", "c0", "c1", "c3", "c4", "c5"][i % 6] } else { "c3" };
    let line = |(i, curve): (usize, &&(String, Vec<f64>))| (class(i), Marks::Line(thinned(steps, &curve.1)));
    let short_name = |name: &str| match name.strip_prefix("explained_variance") {
        Some("") => "all models".to_owned(),
        Some(model) => model.trim_start_matches('_').to_owned(),
        None => name.to_owned(),
    };
    let legend = curves.iter().enumerate().map(|(i, (name, _))| (short_name(name), class(i)));
    let (first, last) = (steps.first()?, steps.last()?);
    let end: Vec<String> = curves
        .iter()
        .filter_map(|(name, values)| {
            let last = values.iter().copied().rev().find_map(finite)?;
            Some(if curves.len() > 1 { format!("{} {}", short_name(name), short(last)) } else { short(last) })
        })
        .collect();
    Some(Figure {
        name: format!("training_{}", key.replace(|c: char| !c.is_ascii_alphanumeric(), "_")),
        title: title.into(),
        caption: format!(
            "{meaning}. {} logged steps, {} to {}; at the end {}.{}",
            count(steps.len() as u64),
            short(*first),
            short(*last),
            end.join(", "),
            if log {
                " Log scale."
            } else if clipped {
                " What lies below -1 is drawn at -1."
            } else {
                ""
            }
        ),
        histograms: vec![],
        section: Section::Training,
        chart: Chart {
            x: Axis::linear("step", if *first < 0.05 * last { 0.0 } else { *first }, *last, 4),
            y,
            series: curves.iter().enumerate().map(line).collect(),
            legend: if curves.len() > 1 { legend.collect() } else { vec![] },
            rules: vec![],
        },
    })
}

/// At most about [`MAX_POINTS`] points; no peak is lost.
fn thinned(steps: &[f64], values: &[f64]) -> Vec<(f64, f64)> {
    let points: Vec<(f64, f64)> = steps.iter().copied().zip(values.iter().copied()).collect();
    if points.len() <= MAX_POINTS {
        return points;
    }
    let stretch = points.len().div_ceil(MAX_POINTS / 2);
    let extremes = |stretch: &[(f64, f64)]| {
        let by = |a: &&(f64, f64), b: &&(f64, f64)| a.1.total_cmp(&b.1);
        let pair = [stretch.iter().min_by(by), stretch.iter().max_by(by)];
        let mut pair: Vec<(f64, f64)> = pair.into_iter().flatten().copied().collect();
        pair.sort_by(|a, b| a.0.total_cmp(&b.0));
        pair
    };
    points.chunks(stretch).flat_map(extremes).collect()
}
