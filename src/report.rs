//! The model diff of a crosscoder as one HTML page, as JSON, as CSV and as charts, from the numbers of
//! [`crate::analysis`].
//!
//! The page is one file: no network, no library, charts as inline SVG. Its table of latents is drawn by a script of its
//! own from a compact block of data (numbers with 16 significant bits, three bytes each); JSON and CSV have them in
//! full. Names that come from a cfg or the command line are escaped wherever they stand. The same input gives the same
//! bytes.

mod figures;
mod page;
mod svg;
mod training;

pub use figures::Figure;
pub use training::{MAX_NAMES, TrainingLog};

use crate::analysis::{ActivationStats, DecoderNorms, Group, LatentScaling, Thresholds, finite, group_name};
use crate::backend::Backend;
use crate::config::Config;
use crate::crosscoder::{CrossCoder, model_name};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use serde_json::{Map, Value, json};
use svg::put;

/// Everything a report shows.
#[derive(Clone, Debug)]
pub struct Report {
    source: String,
    activations_source: String,
    factors: Vec<f64>,
    names: Vec<String>,
    cfg: Config,
    dtype: Dtype,
    d_in: usize,
    thresholds: Thresholds,
    norms: DecoderNorms,
    activations: Option<ActivationStats>,
    training: Option<TrainingLog>,
}

impl Report {
    /// What the weights alone tell. `norms` are the crosscoder's.
    ///
    /// Models are called by the list of strings in the cfg's `model_names`, if it has one of the right length;
    /// otherwise A and B, or by their numbers.
    ///
    /// # Panics
    /// If `norms` have another number of latents or models.
    pub fn new<B: Backend>(crosscoder: &CrossCoder<B>, norms: DecoderNorms) -> Self {
        norms.assert_of(crosscoder);
        let n = crosscoder.n_models();
        let cfg = crosscoder.cfg().clone();
        let from_cfg = cfg.get("model_names").and_then(Value::as_array).map(|names| {
            names.iter().filter_map(Value::as_str).filter(|name| !name.is_empty()).map(str::to_owned).collect()
        });
        let names = from_cfg
            .filter(|names: &Vec<String>| names.len() == n)
            .unwrap_or_else(|| (0..n).map(|m| format!("model {}", model_name(m, n))).collect());
        Report {
            source: String::new(),
            activations_source: String::new(),
            factors: Vec::new(),
            names,
            cfg,
            dtype: crosscoder.dtype(),
            d_in: crosscoder.d_in(),
            thresholds: Thresholds::default(),
            norms,
            activations: None,
            training: None,
        }
    }

    /// Says where the weights come from: a path or an address, shown as it is.
    pub fn with_source(self, source: impl Into<String>) -> Self {
        Report { source: source.into(), ..self }
    }

    /// Names the models.
    ///
    /// # Errors
    /// Another number of names than of models.
    pub fn with_names(self, names: Vec<String>) -> Result<Self> {
        let n = self.norms.n_models();
        if names.len() != n {
            return Err(Error::usage(format!("the crosscoder reads {n} models, found {} names", names.len())));
        }
        Ok(Report { names, ..self })
    }

    /// Parts the groups elsewhere than at 0.3 and 0.7.
    pub fn with_thresholds(self, thresholds: Thresholds) -> Self {
        Report { thresholds, ..self }
    }

    /// Adds what activations tell, and where they come from.
    ///
    /// # Panics
    /// If `stats` have another number of latents or models.
    pub fn with_activations(self, stats: ActivationStats, source: impl Into<String>) -> Self {
        let of = (stats.explained_variance_per_model.len(), stats.latents.len());
        assert_eq!(of, (self.norms.n_models(), self.norms.d_hidden()), "the statistics are of another crosscoder");
        Report { activations: Some(stats), activations_source: source.into(), ..self }
    }

    /// Says what the rows of the activations were multiplied with: a factor for each model.
    pub fn with_factors(self, factors: Vec<f64>) -> Self {
        Report { factors, ..self }
    }

    /// Adds the curves of the training run.
    pub fn with_training(self, log: TrainingLog) -> Self {
        Report { training: (!log.steps.is_empty()).then_some(log), ..self }
    }

    /// The page.
    pub fn to_html(&self) -> String {
        page::html(self)
    }

    /// The charts, in the order of the page.
    pub fn figures(&self) -> Vec<Figure> {
        figures::all(self)
    }

    fn letter(&self, m: usize) -> String {
        model_name(m, self.norms.n_models())
    }

    fn is_pair(&self) -> bool {
        self.norms.n_models() == 2
    }

    fn latents(&self) -> std::ops::Range<usize> {
        0..self.norms.d_hidden()
    }

    fn group(&self, h: usize) -> Option<Group> {
        self.norms.group(h, &self.thresholds)
    }

    /// A only, shared, B only, without a direction.
    fn group_sizes(&self) -> [u64; 4] {
        self.norms.groups(&self.thresholds).map(|(_, size)| size)
    }

    /// All numbers as one JSON object. What is undefined is null. Per-latent numbers are lists, one entry a latent.
    pub fn to_json(&self) -> String {
        let mut top = Map::new();
        let mut add = |key: &str, value: Value| {
            top.insert(key.to_owned(), value);
        };
        add("crosscoder_version", env!("CARGO_PKG_VERSION").into());
        add("checkpoint", self.source.as_str().into());
        add("models", self.names.clone().into());
        add("n_models", self.norms.n_models().into());
        add("d_in", self.d_in.into());
        add("dict_size", self.norms.d_hidden().into());
        add("dtype", self.dtype.to_string().into());
        if self.is_pair() {
            add("thresholds", json!([self.thresholds.low(), self.thresholds.high()]));
            let groups = self.norms.groups(&self.thresholds).map(|(name, size)| (name.to_owned(), size.into()));
            add("groups", Map::from_iter(groups).into());
        }
        if let Some(stats) = &self.activations {
            add("activations", self.activations_json(stats));
        }
        if let Some(log) = &self.training {
            let mut curves = Map::from_iter([("step".to_owned(), numbers(log.steps.iter().copied()))]);
            let named = log.curves.iter().map(|(name, values)| (name.clone(), numbers(values.iter().copied())));
            curves.extend(named);
            add("training", curves.into());
            if log.left_out > 0 {
                add("training_names_left_out", log.left_out.into());
            }
        }
        let histograms = self.figures().into_iter().flat_map(|figure| {
            figure.histograms.into_iter().map(|(name, h)| {
                (name, json!({"low": h.low, "high": h.high, "counts": h.counts, "outside": h.outside}))
            })
        });
        add("histograms", Map::from_iter(histograms).into());
        let mut latents = Map::new();
        for column in self.columns() {
            latents.insert(column.key, Value::Array(column.values.into_iter().map(|cell| cell.json()).collect()));
        }
        add("latents", latents.into());
        add("cfg", self.cfg.keys().clone().into());
        let mut text = Value::from(top).to_string();
        text.push('\n');
        text
    }

    fn activations_json(&self, stats: &ActivationStats) -> Value {
        let losses = stats.losses.iter().map(|(name, value)| (name.clone(), number(*value)));
        json!({
            "source": self.activations_source,
            "factors": self.factors,
            "rows": stats.rows,
            "batches": stats.batches,
            "batch_size": stats.batch_size,
            "losses": Map::from_iter(losses),
            "explained_variance_of_all_rows": number(stats.explained_variance),
            "explained_variance_of_all_rows_per_model": numbers(stats.explained_variance_per_model.iter().copied()),
            "dead": stats.dead(),
            "l0": stats.l0,
        })
    }

    /// The numbers of all latents, a line each, under names as in the JSON; what is undefined is empty.
    pub fn to_csv(&self) -> String {
        let columns = self.columns();
        let mut out = String::from("latent");
        columns.iter().for_each(|column| put(&mut out, format_args!(",{}", column.key)));
        out.push('\n');
        for h in self.latents() {
            put(&mut out, format_args!("{h}"));
            for column in &columns {
                out.push(',');
                column.values[h].csv(&mut out);
            }
            out.push('\n');
        }
        out
    }

    /// All numbers of all latents, by name.
    fn columns(&self) -> Vec<Column> {
        let n = self.norms.n_models();
        let mut columns = Vec::new();
        let mut add = |key: String, f: &mut dyn FnMut(usize) -> Cell| {
            columns.push(Column { key, values: self.latents().map(f).collect() });
        };
        if self.is_pair() {
            add("group".into(), &mut |h| Cell::Name(group_name(self.group(h))));
        }
        for m in 0..n {
            add(format!("decoder_norm_{}", self.letter(m)), &mut |h| Cell::number(self.norms.norms(h)[m]));
        }
        if self.is_pair() {
            add("relative_decoder_norm".into(), &mut |h| Cell::Number(self.norms.relative_norm(h)));
            add("cosine".into(), &mut |h| Cell::Number(self.norms.cosine(h)));
        } else if n > 2 {
            for m in 0..n {
                add(format!("relative_decoder_norm_{m}"), &mut |h| Cell::Number(self.norms.relative(h, m)));
            }
        }
        let Some(stats) = &self.activations else { return columns };
        add("fired".into(), &mut |h| Cell::Count(stats.latents[h].fired));
        add("density".into(), &mut |h| Cell::number(stats.density(h)));
        add("mean_when_active".into(), &mut |h| Cell::Number(stats.latents[h].mean_when_active()));
        add("max".into(), &mut |h| Cell::number(stats.latents[h].max));
        let scaling: Vec<Option<LatentScaling>> = self.latents().map(|h| stats.scaling(&self.norms, h)).collect();
        let of = |h: usize, f: &dyn Fn(&LatentScaling) -> Option<f64>| Cell::Number(scaling[h].as_ref().and_then(f));
        for m in 0..n {
            let letter = self.letter(m);
            add(format!("beta_reconstruction_{letter}"), &mut |h| of(h, &|s| finite(s.beta_reconstruction[m])));
            add(format!("beta_error_{letter}"), &mut |h| of(h, &|s| finite(s.beta_error[m])));
        }
        if self.is_pair() {
            add("nu_reconstruction".into(), &mut |h| of(h, &LatentScaling::nu_reconstruction));
            add("nu_error".into(), &mut |h| of(h, &LatentScaling::nu_error));
        }
        add("top_rows".into(), &mut |h| Cell::Rows(stats.latents[h].top.iter().map(|t| t.row).collect()));
        add("top_activations".into(), &mut |h| Cell::Numbers(stats.latents[h].top.iter().map(|t| t.act).collect()));
        columns
    }
}

/// The numbers of all latents under one name.
struct Column {
    key: String,
    values: Vec<Cell>,
}

enum Cell {
    Name(&'static str),
    Count(u64),
    Number(Option<f64>),
    Rows(Vec<u64>),
    Numbers(Vec<f64>),
}

impl Cell {
    fn number(v: f64) -> Self {
        Cell::Number(finite(v))
    }

    fn json(self) -> Value {
        match self {
            Cell::Name(name) => name.into(),
            Cell::Count(n) => n.into(),
            Cell::Number(v) => v.into(),
            Cell::Rows(rows) => rows.into(),
            Cell::Numbers(values) => numbers(values),
        }
    }

    /// Lists are separated by spaces.
    fn csv(&self, out: &mut String) {
        let list = |out: &mut String, texts: &mut dyn Iterator<Item = String>| {
            for (i, text) in texts.enumerate() {
                out.push_str(if i > 0 { " " } else { "" });
                out.push_str(&text);
            }
        };
        match self {
            Cell::Name(name) => out.push_str(name),
            Cell::Count(n) => put(out, format_args!("{n}")),
            Cell::Number(None) => {}
            Cell::Number(Some(v)) => put(out, format_args!("{v:?}")),
            Cell::Rows(rows) => list(out, &mut rows.iter().map(u64::to_string)),
            Cell::Numbers(values) => list(out, &mut values.iter().map(|v| format!("{v:?}"))),
        }
    }
}

/// 0, 1, 2 for A only, shared, B only; 3 for a latent whose decoder vectors are zero or not finite.
fn group_index(group: Option<Group>) -> usize {
    match group {
        Some(Group::AOnly) => 0,
        Some(Group::Shared) => 1,
        Some(Group::BOnly) => 2,
        None => 3,
    }
}

fn number(v: f64) -> Value {
    finite(v).into()
}

fn numbers(values: impl IntoIterator<Item = f64>) -> Value {
    values.into_iter().map(number).collect::<Vec<_>>().into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::analysis::ActivationPass;
    use crate::autodiff::Parameters;
    use crate::backend::Cpu;
    use crate::tensor::{Tensor, Values};

    const HOSTILE: &str = "</script><script>alert(1)</script><!-- & \"q\" 'a' \u{0}";

    /// `n_models` with d_in 2; latent 0 is zero everywhere, latent 1 is in the last model alone and latent 2 never
    /// fires.
    fn crosscoder(n_models: usize) -> CrossCoder {
        let d_hidden = 5;
        let tensor = |shape: &[usize], values: Vec<f32>| Tensor::new(shape.to_vec(), Values::F32(values)).unwrap();
        let counting = |n: usize| (0..n).map(|i| (i * 7 % 11) as f32 / 4.0 - 1.0).collect::<Vec<_>>();
        let mut w_dec = counting(d_hidden * n_models * 2);
        w_dec[..n_models * 2].fill(0.0);
        w_dec[n_models * 2..(2 * n_models - 1) * 2].fill(0.0);
        let weights = Parameters {
            w_enc: tensor(&[n_models, 2, d_hidden], counting(n_models * 2 * d_hidden)),
            w_dec: tensor(&[d_hidden, n_models, 2], w_dec),
            b_enc: tensor(&[d_hidden], vec![0.5, 0.5, -99.0, 0.5, 0.5]),
            b_dec: tensor(&[n_models, 2], vec![0.1; n_models * 2]),
        };
        let mut cfg = Config::default();
        cfg.set("d_in", 2);
        cfg.set("dict_size", d_hidden);
        cfg.set(HOSTILE, HOSTILE);
        CrossCoder::from_tensors(Cpu::new(Dtype::F32), cfg, weights).unwrap()
    }

    fn report(n_models: usize) -> Report {
        let crosscoder = crosscoder(n_models);
        let norms = DecoderNorms::of(&crosscoder).unwrap();
        let mut pass = ActivationPass::new(&crosscoder, &norms, 2);
        let x: Vec<f32> = (0..6 * n_models * 2).map(|i| (i * 5 % 13) as f32 / 3.0 - 2.0).collect();
        x.chunks(4 * n_models * 2).for_each(|batch| pass.add(batch).unwrap());
        let stats = pass.finish().unwrap();
        let log = "{\"step\": 0, \"loss\": 100.0, \"<i>\": 1}\n{\"step\": 100, \"loss\": 1.5, \"<i>\": 2}\n";
        Report::new(&crosscoder, norms)
            .with_source(HOSTILE)
            .with_names(vec![HOSTILE.to_owned(); n_models])
            .unwrap()
            .with_activations(stats, HOSTILE)
            .with_training(TrainingLog::from_jsonl(log).unwrap())
    }

    #[test]
    fn the_page_is_one_file_and_foreign_text_stays_text() {
        for n_models in 1..4 {
            let html = report(n_models).to_html();
            assert_eq!(html.matches("<script").count(), 2, "the data and ours");
            assert_eq!(html.matches("</script>").count(), 2);
            for element in ["alert(1)</script", "<i>", "<!--", "\0"] {
                assert!(!html.contains(element), "{element}");
            }
            let addresses = html.replace("http://www.w3.org/2000/svg", "");
            for address in ["http://", "https://", " src=", "@import", "url(", "href="] {
                assert!(!addresses.contains(address), "{address} would load something");
            }
            for text in [">NaN", " nan", "NaN<", ">inf", "∞"] {
                let (content, _) = html.split_once("<script>").unwrap();
                assert!(!content.contains(text), "{text} with {n_models} models");
            }
            assert_eq!(html, report(n_models).to_html(), "the same bytes every time");
        }
    }

    #[test]
    #[should_panic(expected = "the norms are of another crosscoder")]
    fn norms_of_another_crosscoder_are_refused() {
        Report::new(&crosscoder(2), DecoderNorms::of(&crosscoder(3)).unwrap());
    }

    #[test]
    #[should_panic(expected = "the statistics are of another crosscoder")]
    fn statistics_of_another_crosscoder_are_refused() {
        report(2).with_activations(report(3).activations.unwrap(), "");
    }

    #[test]
    fn json_and_csv_have_the_same_numbers() {
        let report = report(2);
        let json: Value = serde_json::from_str(&report.to_json()).unwrap();
        let csv = report.to_csv();
        let mut lines = csv.lines().map(|line| line.split(',').collect::<Vec<_>>());
        let header = lines.next().unwrap();
        let lines: Vec<_> = lines.collect();
        assert_eq!(lines.len(), 5);
        let latents = json["latents"].as_object().unwrap();
        assert_eq!(header[1..], latents.keys().map(String::as_str).collect::<Vec<_>>());
        for (h, line) in lines.iter().enumerate() {
            assert_eq!(line.len(), header.len());
            assert_eq!(line[0], h.to_string());
            for (key, text) in header.iter().zip(line).skip(1) {
                match &latents[*key][h] {
                    Value::Null => assert_eq!(*text, ""),
                    Value::String(name) => assert_eq!(text, name),
                    Value::Array(list) => {
                        let list: Vec<f64> = list.iter().map(|v| v.as_f64().unwrap()).collect();
                        let texts: Vec<f64> = text.split_whitespace().map(|v| v.parse().unwrap()).collect();
                        assert_eq!(texts, list, "{key}");
                    }
                    number => assert_eq!(text.parse::<f64>().ok(), number.as_f64(), "{key}"),
                }
            }
        }
        assert_eq!(json["groups"]["no direction"], 1);
        assert_eq!(json["activations"]["rows"], 6);
        assert_eq!(json["training"]["loss"], json!([100.0, 1.5]));
        assert_eq!(json["latents"]["relative_decoder_norm"][1], json!(1.0));
        assert_eq!(json["latents"]["cosine"][1], Value::Null);
        assert_eq!(json["latents"]["mean_when_active"][2], Value::Null);
    }

    #[test]
    fn a_row_of_a_large_set_keeps_its_number() {
        for (row, bytes) in [(5, 3), ((1 << 24) - 2, 3), ((1 << 24) - 1, 6), (1 << 40, 6)] {
            // Six rows of a set were looked at, of which one is far behind.
            let mut report = report(2);
            let stats = report.activations.as_mut().unwrap();
            let top = stats.latents.iter_mut().find_map(|latent| latent.top.first_mut());
            top.unwrap().row = row;
            assert!(report.to_html().contains(&format!("\"type\":\"rows\",\"bytes\":{bytes},")), "{row}");
        }
    }

    #[test]
    fn histograms_count_every_latent_once() {
        let report = report(2);
        let json: Value = serde_json::from_str(&report.to_json()).unwrap();
        let total = |name: &str| -> u64 {
            let h = &json["histograms"][name];
            let counts: u64 = h["counts"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).sum();
            counts + h["outside"].as_u64().unwrap()
        };
        assert_eq!(total("relative_decoder_norm"), 4, "all but the one without a direction");
        assert_eq!(total("decoder_norm_A"), 5);
        assert_eq!(total("l0"), 6);
        assert_eq!(total("log10_density"), 5 - report.activations.as_ref().unwrap().dead());
        assert_eq!(total("cosine_of_shared"), report.group_sizes()[1]);
    }

    #[test]
    fn other_numbers_of_models_have_norms_and_no_groups() {
        let of = |n_models: usize| report(n_models).figures().into_iter().map(|f| f.name).collect::<Vec<_>>();
        assert_eq!(of(1), ["decoder_norm", "density", "l0", "activation", "training_loss", "training__i_"]);
        assert_eq!(of(3)[..2], ["decoder_norm", "relative_decoder_norm"]);
        let json: Value = serde_json::from_str(&report(3).to_json()).unwrap();
        assert!(json.get("groups").is_none() && json["latents"].get("group").is_none());
        assert_eq!(json["latents"]["relative_decoder_norm_2"][1], json!(1.0));
    }

    #[test]
    fn any_numbers_and_names_of_a_log_make_charts() {
        let crosscoder = crosscoder(2);
        let report = |log: &str| {
            let log = TrainingLog::from_jsonl(log).unwrap();
            Report::new(&crosscoder, DecoderNorms::of(&crosscoder).unwrap()).with_training(log)
        };
        let numbers = ["0", "5e-324", "1e-310", "1e300", "1e308", "1.7e308", "-1e308", "-1.7e308"];
        for (a, b) in numbers.iter().flat_map(|a| numbers.iter().map(move |b| (a, b))) {
            for key in ["loss", "lr", "explained_variance"] {
                let lines =
                    |x: &str, y: &str| format!("{{\"step\":{x},\"{key}\":{a}}}\n{{\"step\":{y},\"{key}\":{b}}}\n");
                for log in [lines("1", "2"), lines("-1e308", "1.7e308"), lines("1.7e308", "1.7e308")] {
                    for svg in report(&log).figures().iter().map(Figure::to_svg) {
                        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{log}: {svg}");
                    }
                }
            }
        }
        let names: Vec<String> = (0..3000).map(|i| format!("\"k{i}\":1")).collect();
        let report = report(&format!("{{\"step\":1,\"a b\":1,\"a_b\":2,{}}}\n", names.join(",")));
        let figures: Vec<String> = report.figures().into_iter().map(|f| f.name).collect();
        assert_eq!(figures[3..5], ["training_a_b", "training_a_b_"]);
        assert_eq!(figures.len(), 3 + 64);
        assert!(report.to_html().contains("Left out: 2,938 more names"));
        assert_eq!(serde_json::from_str::<Value>(&report.to_json()).unwrap()["training_names_left_out"], 2938);
    }

    #[test]
    fn charts_stand_alone() {
        for figure in report(2).figures() {
            let svg = figure.to_svg();
            assert!(svg.starts_with("<svg xmlns=") && svg.contains("<style>") && svg.ends_with("</svg>"));
            assert!(!svg.contains("NaN") && !svg.contains("inf\""), "{}", figure.name);
        }
    }

    #[test]
    fn names_come_from_the_cfg_or_the_caller() {
        let mut crosscoder = crosscoder(2);
        let norms = DecoderNorms::of(&crosscoder).unwrap();
        assert_eq!(Report::new(&crosscoder, norms.clone()).names, ["model A", "model B"]);
        crosscoder.cfg_mut().set("model_names", vec!["base", "chat"]);
        assert_eq!(Report::new(&crosscoder, norms.clone()).names, ["base", "chat"]);
        assert!(Report::new(&crosscoder, norms.clone()).with_names(vec!["one".into()]).is_err());
        crosscoder.cfg_mut().set("model_names", vec!["base"]);
        assert_eq!(Report::new(&crosscoder, norms).names, ["model A", "model B"]);
    }

    #[test]
    fn weights_that_are_not_finite_are_undefined_not_nan() {
        let crosscoder = crosscoder(2);
        let mut weights = crosscoder.to_tensors().unwrap();
        let mut values = weights.w_dec.to_f64_vec().iter().map(|&v| v as f32).collect::<Vec<_>>();
        values[8] = f32::NAN;
        values[12] = f32::INFINITY;
        weights.w_dec = Tensor::new(vec![5, 2, 2], Values::F32(values)).unwrap();
        let backend = crosscoder.backend().clone();
        let crosscoder: CrossCoder = CrossCoder::from_tensors(backend, crosscoder.cfg().clone(), weights).unwrap();
        let norms = DecoderNorms::of(&crosscoder).unwrap();
        let mut pass = ActivationPass::new(&crosscoder, &norms, 2);
        pass.add(&[1.0; 8]).unwrap();
        let stats = pass.finish().unwrap();
        let report = Report::new(&crosscoder, norms).with_activations(stats, "");
        let json: Value = serde_json::from_str(&report.to_json()).unwrap();
        assert_eq!(json["latents"]["decoder_norm_A"][2], Value::Null);
        assert_eq!(json["groups"]["no direction"], 3);
        let html = report.to_html();
        assert!(!html.split_once("<script>").unwrap().0.contains("NaN"));
    }
}
