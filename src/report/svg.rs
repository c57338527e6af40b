//! Charts as SVG: bars, steps and lines over two axes. Colours and fonts come from classes, so that a page can restyle
//! them.

use crate::analysis::{Histogram, finite};
use std::fmt::Write;

const WIDTH: f64 = 420.0;
const HEIGHT: f64 = 240.0;
/// The plot's edges.
const LEFT: f64 = 58.0;
const RIGHT: f64 = 406.0;
const TOP: f64 = 26.0;
const BOTTOM: f64 = 196.0;

/// Styles of a chart that stands alone; the page has its own.
pub(super) const STYLE: &str = "svg{background:#fff}text{font:11px system-ui,sans-serif;fill:#333}.g{stroke:#ddd}\
    .x{stroke:#555}.t{stroke:#555;stroke-dasharray:3 3}path{fill:none}path.s{stroke-width:1.5;stroke-linejoin:round}\
    rect.c0{fill:#1f5fa8}rect.c1{fill:#b4500f}rect.c2{fill:#5b6770}rect.c3{fill:#2e7d4f}rect.c4{fill:#7b4fa3}\
    rect.c5{fill:#a33b56}path.c0{stroke:#1f5fa8}path.c1{stroke:#b4500f}path.c2{stroke:#5b6770}path.c3{stroke:#2e7d4f}\
    path.c4{stroke:#7b4fa3}path.c5{stroke:#a33b56}";

/// The classes of series, in order; a seventh looks like the first.
pub(super) const SERIES: [&str; 6] = ["c0", "c1", "c2", "c3", "c4", "c5"];

/// How numbers become positions.
#[derive(Clone, Debug)]
pub(super) struct Axis {
    label: String,
    low: f64,
    high: f64,
    ticks: Vec<(f64, String)>,
    log: bool,
}

impl Axis {
    /// From `low` to `high`, with about `ticks` ticks at round numbers. Any finite numbers will do.
    pub(super) fn linear(label: &str, low: f64, high: f64, ticks: usize) -> Self {
        let (low, high) = if half_distance(low, high) > SMALLEST_DISTANCE {
            (low, high)
        } else {
            // 1 more, or what a large number can be told apart by; below the largest numbers, above which there is nothing.
            let more = (low.abs() * 1e-9).max(1.0);
            if low < f64::MAX - more { (low, low + more) } else { (low - more, low) }
        };
        let step = nice_ceil(half_distance(low, high) / (ticks as f64 / 2.0));
        let first = (low / step - 1e-9).ceil() as i64;
        let last = (high / step + 1e-9).floor() as i64;
        let ticks = (first..=last).map(|i| (i as f64 * step, short(i as f64 * step))).collect();
        Axis { label: label.to_owned(), low, high, ticks, log: false }
    }

    /// From `low` to `high`, both above 0, with ticks at powers of ten (and at 2 and 5 times them where they are few).
    pub(super) fn log(label: &str, low: f64, high: f64) -> Self {
        let (low, high) = if high / low > 1.000_001 {
            (low, high)
        } else if low < f64::MAX / 10.0 {
            (low, low * 10.0)
        } else {
            (low / 10.0, low)
        };
        let (first, last) = (low.log10().floor() as i32, high.log10().ceil() as i32);
        let factors: &[f64] = if high / low < 600.0 { &[1.0, 2.0, 5.0] } else { &[1.0] };
        // One way of writing for all ticks of an axis.
        let plain = first >= -2 && last <= 4;
        let every = ((last - first - 1) / 6 + 1) as usize;
        let ticks = (first..=last)
            .step_by(every)
            .flat_map(|e| factors.iter().map(move |f| (f * 10f64.powi(e), e)))
            .filter(|(v, _)| v.is_finite() && *v >= low * 0.999_999 && *v <= high * 1.000_001)
            .map(|(v, e)| (v, if plain || v == 1.0 { short(v) } else { power(v, e) }))
            .collect();
        Axis { label: label.to_owned(), low, high, ticks, log: true }
    }

    /// For a histogram of log10: `low` to `high` are logarithms, the ticks show the numbers.
    pub(super) fn of_log10(label: &str, low: f64, high: f64) -> Self {
        let Axis { label, ticks, .. } = Self::log(label, 10f64.powf(low), 10f64.powf(high));
        Axis { label, low, high, ticks: ticks.into_iter().map(|(v, text)| (v.log10(), text)).collect(), log: false }
    }

    /// For counts up to `max`: from 0, or logarithmic from a half, so that a count of 1 has a height.
    pub(super) fn counts(label: &str, max: u64, log: bool) -> Self {
        if log {
            let mut axis = Self::log(&format!("{label} (log scale)"), 0.5, (max as f64 * 1.3).max(10.0));
            axis.ticks.retain(|(count, _)| *count >= 1.0);
            return axis;
        }
        let step = nice_ceil((max as f64 / 4.0).max(1.0));
        Self::linear(label, 0.0, step * (max as f64 / step).ceil().max(1.0), 4)
    }

    /// 0 at `low`, 1 at `high`.
    fn share(&self, v: f64) -> f64 {
        let share = if self.log {
            (v.max(self.low).ln() - self.low.ln()) / (self.high.ln() - self.low.ln())
        } else {
            half_distance(self.low, v) / half_distance(self.low, self.high)
        };
        share.clamp(0.0, 1.0)
    }

    fn x(&self, v: f64) -> f64 {
        LEFT + self.share(v) * (RIGHT - LEFT)
    }

    fn y(&self, v: f64) -> f64 {
        BOTTOM - self.share(v) * (BOTTOM - TOP)
    }
}

/// What is drawn in one colour.
#[derive(Clone, Debug)]
pub(super) enum Marks {
    /// Bars, each with its own class.
    Bars(Vec<Bar>),
    /// The outline of a histogram.
    Steps(Histogram),
    /// A line through points, interrupted where y is not finite.
    Line(Vec<(f64, f64)>),
}

#[derive(Clone, Debug)]
pub(super) struct Bar {
    pub(super) from: f64,
    pub(super) to: f64,
    pub(super) count: u64,
    pub(super) class: &'static str,
    /// What a pointer on the bar shows.
    pub(super) says: String,
}

/// A chart: axes and marks.
#[derive(Clone, Debug)]
pub(super) struct Chart {
    pub(super) x: Axis,
    pub(super) y: Axis,
    pub(super) series: Vec<(&'static str, Marks)>,
    /// Names and classes above the plot.
    pub(super) legend: Vec<(String, &'static str)>,
    /// Dashed vertical lines.
    pub(super) rules: Vec<f64>,
}

impl Chart {
    /// The chart's SVG element. `id` names its title and description within the page; `style` is put inside.
    pub(super) fn svg(&self, id: &str, title: &str, description: &str, style: Option<&str>) -> String {
        // Without a legend its space is left out.
        let top = if self.legend.is_empty() { 14.0 } else { 0.0 };
        let mut out = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 {top} {WIDTH} {}\" role=\"img\" \
             aria-labelledby=\"{id}-t {id}-d\"><title id=\"{id}-t\">{}</title><desc id=\"{id}-d\">{}</desc>",
            HEIGHT - top,
            escape(title),
            escape(description)
        );
        if let Some(style) = style {
            put(&mut out, format_args!("<style>{style}</style>"));
        }
        self.axes(&mut out);
        for (class, marks) in &self.series {
            self.marks(&mut out, class, marks);
        }
        for &at in &self.rules {
            put(&mut out, format_args!("<path class=\"t\" d=\"M{:.1} {TOP}V{BOTTOM}\"/>", self.x.x(at)));
        }
        let mut x = LEFT;
        for (name, class) in &self.legend {
            put(&mut out, format_args!("<rect class=\"{class}\" x=\"{x:.1}\" y=\"6\" width=\"9\" height=\"9\"/>"));
            put(&mut out, format_args!("<text x=\"{:.1}\" y=\"14.5\">{}</text>", x + 13.0, escape(name)));
            x += 27.0 + 5.8 * name.chars().count() as f64;
        }
        out.push_str("</svg>");
        out
    }

    fn axes(&self, out: &mut String) {
        // Longer ones would reach into the axis' label.
        let long = !self.y.log && self.y.ticks.iter().any(|(_, text)| text.chars().count() > 6);
        for (v, text) in &self.y.ticks {
            let text = if long { scientific(*v) } else { text.clone() };
            let y = self.y.y(*v);
            put(out, format_args!("<path class=\"g\" d=\"M{LEFT} {y:.1}H{RIGHT}\"/>"));
            put(out, format_args!("<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{text}</text>", LEFT - 5.0, y + 3.8));
        }
        for (v, text) in &self.x.ticks {
            let x = self.x.x(*v);
            put(out, format_args!("<path class=\"x\" d=\"M{x:.1} {BOTTOM}v4\"/>"));
            put(out, format_args!("<text x=\"{x:.1}\" y=\"{}\" text-anchor=\"middle\">{text}</text>", BOTTOM + 16.0));
        }
        put(out, format_args!("<path class=\"x\" d=\"M{LEFT} {BOTTOM}H{RIGHT}\"/>"));
        let (x, y) = ((LEFT + RIGHT) / 2.0, (TOP + BOTTOM) / 2.0);
        let (x_label, y_label) = (escape(&self.x.label), escape(&self.y.label));
        let bottom = HEIGHT - 8.0;
        put(out, format_args!("<text x=\"{x}\" y=\"{bottom}\" text-anchor=\"middle\">{x_label}</text>"));
        put(
            out,
            format_args!("<text transform=\"translate(11 {y})rotate(-90)\" text-anchor=\"middle\">{y_label}</text>"),
        );
    }

    fn marks(&self, out: &mut String, class: &str, marks: &Marks) {
        match marks {
            Marks::Bars(bars) => {
                for bar in bars.iter().filter(|bar| bar.count > 0) {
                    let (from, to) = (self.x.x(bar.from), self.x.x(bar.to));
                    // A count of 1 among thousands must not vanish.
                    let height = (BOTTOM - self.y.y(bar.count as f64)).max(1.0);
                    let width = if to - from > 3.0 { to - from - 0.6 } else { to - from };
                    put(
                        out,
                        format_args!(
                            "<rect class=\"{}\" x=\"{from:.2}\" y=\"{:.1}\" width=\"{width:.2}\" \
                             height=\"{height:.1}\">\
                             <title>{}</title></rect>",
                            bar.class,
                            BOTTOM - height,
                            escape(&bar.says)
                        ),
                    );
                }
            }
            Marks::Steps(histogram) => {
                let mut path = String::new();
                for (bin, &count) in histogram.counts.iter().enumerate() {
                    let (from, to) = histogram.edges(bin);
                    let y = self.y.y(count as f64);
                    let start = if bin == 0 { format!("M{:.1} {y:.1}", self.x.x(from)) } else { format!("V{y:.1}") };
                    put(&mut path, format_args!("{start}H{:.1}", self.x.x(to)));
                }
                put(out, format_args!("<path class=\"s {class}\" d=\"{path}\"/>"));
            }
            Marks::Line(points) => {
                let mut path = String::new();
                let mut pen = 'M';
                for &(x, y) in points {
                    if finite(y).is_none() {
                        pen = 'M';
                        continue;
                    }
                    put(&mut path, format_args!("{pen}{:.1} {:.1}", self.x.x(x), self.y.y(y)));
                    pen = 'L';
                }
                put(out, format_args!("<path class=\"s {class}\" d=\"{path}\"/>"));
            }
        }
    }
}

pub(super) fn put(out: &mut String, text: std::fmt::Arguments<'_>) {
    out.write_fmt(text).expect("a String takes whatever is written");
}

/// Text for element content and quoted attributes.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            // XML has no other control characters, not even escaped.
            c if c.is_control() && !matches!(c, '\n' | '\t') => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// `(high - low) / 2`, which is finite for all finite numbers.
pub(super) fn half_distance(low: f64, high: f64) -> f64 {
    high / 2.0 - low / 2.0
}

/// Half a distance below which an axis does not tell numbers apart: subnormal numbers are too coarse to divide.
const SMALLEST_DISTANCE: f64 = 1e-300;

/// The smallest of 1, 2, 2.5, 5 times a power of ten that is not below `v`; 1 for what is not above [`SMALLEST_DISTANCE`].
pub(super) fn nice_ceil(v: f64) -> f64 {
    if finite(v).is_none_or(|v| v <= SMALLEST_DISTANCE / 10.0) {
        return 1.0;
    }
    let power = 10f64.powf(v.log10().floor());
    let factor = [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().find(|f| f * power >= v * (1.0 - 1e-12));
    (factor.unwrap_or(10.0) * power).min(f64::MAX)
}

/// A number in at most four significant digits, for people: `0.1234`, `12,350`, `1.2e-5`.
pub(super) fn short(v: f64) -> String {
    if v.is_nan() {
        return "–".to_owned();
    }
    if v == 0.0 || v.is_infinite() {
        return if v == 0.0 { "0".to_owned() } else { format!("{v}").replace("inf", "∞") };
    }
    let text = format!("{v:.3e}");
    let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    let trim = |digits: &str| {
        if digits.contains('.') {
            digits.trim_end_matches('0').trim_end_matches('.').to_owned()
        } else {
            digits.to_owned()
        }
    };
    if !(-4..7).contains(&exponent) {
        return format!("{}e{exponent}", trim(mantissa));
    }
    let decimals = (3 - exponent).max(0) as usize;
    let fixed = trim(&format!("{v:.decimals$}"));
    match fixed.split_once('.') {
        Some((whole, rest)) => format!("{}.{rest}", grouped(whole)),
        None => grouped(&fixed),
    }
}

/// `2.5e-4`, in at most three significant digits.
fn scientific(v: f64) -> String {
    if v == 0.0 {
        return "0".to_owned();
    }
    let text = format!("{v:.2e}");
    let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    format!("{}e{exponent}", mantissa.trim_end_matches('0').trim_end_matches('.'))
}

/// A count: `16,384`.
pub(super) fn count(n: u64) -> String {
    grouped(&n.to_string())
}

fn grouped(digits: &str) -> String {
    let (sign, digits) = digits.strip_prefix('-').map_or(("", digits), |d| ("-", d));
    let mut out = sign.to_owned();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

/// `10⁻⁵`, `2·10⁴`
fn power(v: f64, exponent: i32) -> String {
    let exponent_text = exponent.to_string();
    let digits = exponent_text.chars().map(|c| match c {
        '-' => '⁻',
        '1' => '¹',
        '2' => '²',
        '3' => '³',
        c => c.to_digit(10).and_then(|d| char::from_u32('⁰' as u32 + d)).unwrap_or(c),
    });
    let factor = (v / 10f64.powi(exponent)).round();
    let power: String = "10".chars().chain(digits).collect();
    if factor == 1.0 { power } else { format!("{factor}·{power}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        let cases = [
            (0.123456, "0.1235"),
            (12345.6, "12,346"),
            (1234567.0, "1,234,567"),
            (-0.00012, "-0.00012"),
            (1.25e-5, "1.25e-5"),
            (2e9, "2e9"),
            (0.0, "0"),
            (999.96, "1,000"),
            (f64::NAN, "–"),
            (f64::NEG_INFINITY, "-∞"),
        ];
        for (v, text) in cases {
            assert_eq!(short(v), text);
        }
        assert_eq!([0.0, 3.0 * 2.5e-4, 1e-3, 2e6].map(scientific), ["0", "7.5e-4", "1e-3", "2e6"]);
        assert_eq!([power(1e-5, -5), power(2e4, 4)], ["10⁻⁵", "2·10⁴"]);
        assert_eq!([0.0049, 0.3, 2.5, 2.6, 0.0].map(nice_ceil), [0.005, 0.5, 2.5, 5.0, 1.0]);
    }

    #[test]
    fn ticks_lie_on_the_axis() {
        for axis in [
            Axis::linear("x", 0.0, 1.0, 4),
            Axis::linear("x", -1.0, 1.0, 4),
            Axis::linear("x", 3.0, 3.0, 4),
            Axis::log("x", 0.5, 20000.0),
            Axis::log("x", 1e-7, 1.0),
            Axis::log("x", 3.0, 3.0),
            Axis::counts("n", 0, true),
            Axis::counts("n", 1, false),
            Axis::counts("n", 12345, false),
        ] {
            assert!((2..10).contains(&axis.ticks.len()), "{axis:?}");
            let slack = 1e-9 * (axis.high - axis.low);
            assert!(axis.ticks.iter().all(|t| (axis.low - slack..=axis.high + slack).contains(&t.0)), "{axis:?}");
        }
    }

    #[test]
    fn any_finite_numbers_make_an_axis() {
        let positive = [5e-324, 1e-310, f64::MIN_POSITIVE, 1e-300, 1.0, 9e15, 1e300, 1e308, 1.7e308, f64::MAX];
        let numbers: Vec<f64> =
            positive.iter().flat_map(|&v| [v, v.next_up().min(f64::MAX), -v]).chain([0.0]).collect();
        let check = |axis: Axis| {
            assert!(axis.low.is_finite() && axis.high.is_finite() && axis.ticks.len() < 12, "{axis:?}");
            assert!(axis.ticks.iter().all(|(v, text)| v.is_finite() && !text.contains("NaN")), "{axis:?}");
            assert!(numbers.iter().all(|&v| (LEFT..=RIGHT).contains(&axis.x(v))), "{axis:?}");
        };
        for (i, &low) in numbers.iter().enumerate() {
            for &high in &numbers[i..] {
                let (low, high) = (low.min(high), low.max(high));
                check(Axis::linear("x", low, high, 4));
                if low > 0.0 {
                    check(Axis::log("x", low, high));
                }
            }
        }
    }

    #[test]
    fn text_is_escaped() {
        assert_eq!(escape("<a href='x'>&\"\u{1}"), "&lt;a href=&#39;x&#39;&gt;&amp;&quot;\u{fffd}");
    }
}
