//! The page: text, tables, charts, and the block of data that its script draws the table of latents from.

use super::figures::Section;
use super::svg::{count, escape, put, short};
use super::{Report, group_index};
use crate::analysis::{ActivationStats, Group, LatentScaling, TopRow, finite, group_name};
use serde_json::{Value, json};

const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

/// A column of the table: how it is called, what it means, how its data lie.
struct Shown {
    label: String,
    meaning: String,
    kind: Kind,
}

enum Kind {
    /// The number of the latent: no data.
    Latent,
    /// One byte.
    Group,
    /// The upper three bytes of a float32: 16 significant bits.
    Number(Vec<Option<f64>>),
    /// `count` integers of `bytes` bytes, all ones for none.
    Rows { bytes: usize, count: usize },
}

pub(super) fn html(report: &Report) -> String {
    let title = title(report);
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; \
         script-src 'unsafe-inline'\"><title>{title}</title>\n<style>{STYLE}</style></head><body>\n<header>\
         <h1>{title}</h1>\n",
    );
    let cfg_text = |key: &str| match report.cfg.text(key) {
        Ok(text) if text != "unknown" => format!(" · {}", escape(text)),
        _ => String::new(),
    };
    put(
        &mut out,
        format_args!(
            "<p class=\"soft\">Crosscoder <code>{}</code>{}{} · {} latents{}</p></header>\n<main>\n",
            escape(&report.source),
            cfg_text("model_name"),
            cfg_text("hook_point"),
            count(report.norms.d_hidden() as u64),
            if report.is_pair() && report.names[0] != "model A" {
                format!(" · A is {}, B is {}", escape(&report.names[0]), escape(&report.names[1]))
            } else {
                String::new()
            }
        ),
    );
    summary(report, &mut out);
    let figures = report.figures();
    for (section, heading) in [
        (Section::Weights, "From the weights"),
        (Section::Activations, "From activations"),
        (Section::Training, "Training"),
    ] {
        let mut of = figures.iter().filter(|f| f.section == section).peekable();
        if of.peek().is_none() {
            continue;
        }
        put(&mut out, format_args!("<section><h2>{heading}</h2><div class=\"figures\">\n"));
        for figure in of {
            put(
                &mut out,
                format_args!(
                    "<figure><h3>{}</h3>{}<figcaption>{}</figcaption></figure>\n",
                    escape(&figure.title),
                    figure.inline(),
                    escape(&figure.caption)
                ),
            );
        }
        out.push_str("</div>");
        if let (Section::Training, Some(log)) = (section, &report.training)
            && log.left_out > 0
        {
            let left_out = count(log.left_out as u64);
            put(&mut out, format_args!("<p class=\"soft\">Left out: {left_out} more names of the log.</p>"));
        }
        out.push_str("</section>\n");
    }
    latents(report, &mut out);
    settings(report, &mut out);
    put(
        &mut out,
        format_args!(
            "</main>\n<footer>Written by crosscoder {}. Sums are carried out in float64 on the stored \
             values.</footer>\n\
             <script>{SCRIPT}</script></body></html>\n",
            env!("CARGO_PKG_VERSION")
        ),
    );
    out
}

fn title(report: &Report) -> String {
    match report.names.as_slice() {
        [one] => format!("Crosscoder of {}", escape(one)),
        [a, b] => format!("Model diff: {} and {}", escape(a), escape(b)),
        names => format!("Model diff: {}", escape(&names.join(", "))),
    }
}

/// A group of tiles: what, number, remark.
fn tiles(out: &mut String, tiles: &[(String, String, String)]) {
    out.push_str("<dl>");
    for (what, number, remark) in tiles {
        put(
            out,
            format_args!(
                "<div><dt>{}</dt><dd>{number}{}</dd></div>",
                escape(what),
                if remark.is_empty() { String::new() } else { format!(" <small>{}</small>", escape(remark)) }
            ),
        );
    }
    out.push_str("</dl>\n");
}

fn tile(what: &str, number: impl Into<String>, remark: impl Into<String>) -> (String, String, String) {
    (what.to_owned(), number.into(), remark.into())
}

fn percent(part: u64, of: u64) -> String {
    format!("{:.1} %", 100.0 * part as f64 / of.max(1) as f64)
}

fn median(mut values: Vec<f64>) -> f64 {
    if values.is_empty() {
        return f64::NAN;
    }
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 }
}

fn summary(report: &Report, out: &mut String) {
    let (norms, n_latents) = (&report.norms, report.norms.d_hidden() as u64);
    let n = norms.n_models();
    out.push_str("<section><h2>Summary</h2>");
    let mut weights = vec![];
    if report.is_pair() {
        let sizes = report.group_sizes();
        let (low, high) = (report.thresholds.low(), report.thresholds.high());
        let share = |i: usize| percent(sizes[i], n_latents);
        weights.push(tile(&format!("A only (≤ {low})"), count(sizes[0]), share(0)));
        weights.push(tile("Shared", count(sizes[1]), share(1)));
        weights.push(tile(&format!("B only (≥ {high})"), count(sizes[2]), share(2)));
        if sizes[3] > 0 {
            weights.push(tile("No direction", count(sizes[3]), share(3)));
        }
        let shared = report.latents().filter(|&h| report.group(h) == Some(Group::Shared));
        weights.push(tile(
            "Median cosine of shared",
            short(median(shared.filter_map(|h| norms.cosine(h)).collect())),
            "",
        ));
    }
    for m in 0..n {
        let mean = report.latents().map(|h| norms.norms(h)[m]).sum::<f64>() / n_latents as f64;
        weights.push(tile(&format!("Mean decoder norm {}", report.letter(m)), short(mean), report.names[m].clone()));
    }
    weights.push(tile("Activations' width d_in", count(report.d_in as u64), format!("{n} models, {}", report.dtype)));
    tiles(out, &weights);
    let Some(stats) = &report.activations else {
        out.push_str(
            "<p class=\"soft\">From the weights alone. With activations the report also has losses, densities \
        and Latent Scaling.</p></section>",
        );
        return;
    };
    let times: Vec<String> = report.factors.iter().map(|&factor| short(factor)).collect();
    let rows_from = match report.factors.iter().all(|&factor| factor == 1.0) {
        true => report.activations_source.clone(),
        false => format!("{}, times {}", report.activations_source, times.join(", ")),
    };
    let mut seen = vec![
        tile("Rows of activations", count(stats.rows), rows_from),
        tile("Explained variance", short(stats.explained_variance), "all models"),
    ];
    for (m, &v) in stats.explained_variance_per_model.iter().enumerate() {
        seen.push(tile(&format!("Explained variance {}", report.letter(m)), short(v), report.names[m].clone()));
    }
    seen.push(tile("Dead latents", count(stats.dead()), percent(stats.dead(), n_latents)));
    if report.is_pair() {
        for (group, name) in [(Group::AOnly, "A only"), (Group::BOnly, "B only")] {
            let members = || {
                let of_group = report.latents().filter(|&h| report.group(h) == Some(group));
                of_group.filter_map(|h| stats.scaling(norms, h))
            };
            if members().next().is_none() {
                continue;
            }
            let of = |f: fn(&LatentScaling) -> Option<f64>| short(median(members().filter_map(|s| f(&s)).collect()));
            let numbers = format!("{} / {}", of(LatentScaling::nu_reconstruction), of(LatentScaling::nu_error));
            seen.push(tile(&format!("Median ν of {name}"), numbers, "reconstruction / error"));
        }
    }
    tiles(out, &seen);
    put(
        out,
        format_args!(
            "<p class=\"soft note\">Explained variance: 1 - Σ ‖rec - x‖² / Σ ‖x - mean‖², over all rows. Losses as \
             <code>get_losses</code> gives them, mean over {} rows in {} batches, explained variances about each \
             batch's own mean:</p><div class=\"plain\"><table><tbody>",
            count(stats.rows),
            count(stats.batches)
        ),
    );
    for (name, value) in &stats.losses {
        put(
            out,
            format_args!("<tr><th scope=\"row\"><code>{}</code></th><td>{}</td></tr>", escape(name), short(*value)),
        );
    }
    out.push_str("</tbody></table></div></section>\n");
}

fn shown(report: &Report) -> Vec<Shown> {
    let norms = &report.norms;
    let n = norms.n_models();
    let mut out = vec![Shown { label: "Latent".into(), meaning: "The latent's number".into(), kind: Kind::Latent }];
    let each = |f: &dyn Fn(usize) -> Option<f64>| Kind::Number(report.latents().map(f).collect());
    let mut add = |label: &str, meaning: &str, kind| {
        out.push(Shown { label: label.to_owned(), meaning: meaning.to_owned(), kind });
    };
    if report.is_pair() {
        add("Group", "By the relative decoder norm", Kind::Group);
        let relative = each(&|h| norms.relative_norm(h));
        add("Relative norm", "Relative decoder norm: B's share, 0 is A only, 1 is B only", relative);
    }
    for m in 0..n {
        let label = format!("Norm {}", report.letter(m));
        add(&label, &format!("Decoder norm in {}", report.names[m]), each(&|h| finite(norms.norms(h)[m])));
    }
    if report.is_pair() {
        add("Cosine", "Cosine similarity of the two decoder vectors", each(&|h| norms.cosine(h)));
    } else if n > 2 {
        for m in 0..n {
            let meaning = format!("Share of {} in the sum of the decoder norms", report.names[m]);
            add(&format!("Relative norm {m}"), &meaning, each(&|h| norms.relative(h, m)));
        }
    }
    if let Some(stats) = &report.activations {
        add("Density", "Share of rows on which the latent is above zero", each(&|h| Some(stats.density(h))));
        let mean = each(&|h| stats.latents[h].mean_when_active());
        add("Mean act", "Mean activation over the rows on which it is above zero", mean);
        add("Max act", "Largest activation", each(&|h| finite(stats.latents[h].max)));
        if report.is_pair() {
            let nu = |f: fn(&LatentScaling) -> Option<f64>| {
                Kind::Number(report.latents().map(|h| stats.scaling(norms, h).as_ref().and_then(f)).collect())
            };
            let meaning = "Latent Scaling: the other model's share in the reconstruction; about 0 is exclusive";
            add("ν rec", meaning, nu(LatentScaling::nu_reconstruction));
            let meaning = "Latent Scaling: the other model's share in the error; about 0 is exclusive";
            add("ν error", meaning, nu(LatentScaling::nu_error));
        }
        let most = stats.latents.iter().map(|l| l.top.len()).max().unwrap_or(0);
        if most > 0 {
            // All ones stand for no row.
            let bytes = if largest_row(stats) < (1 << 24) - 1 { 3 } else { 6 };
            add(
                "Strongest rows",
                "Rows of the activations, from 0, strongest first",
                Kind::Rows { bytes, count: most },
            );
        }
    }
    out
}

/// The largest number of a row that is named: one of the whole set, of which few rows may have been looked at.
fn largest_row(stats: &ActivationStats) -> u64 {
    stats.latents.iter().flat_map(|latent| &latent.top).map(|top| top.row).max().unwrap_or(0)
}

fn latents(report: &Report, out: &mut String) {
    let columns = shown(report);
    out.push_str("<section><h2 id=\"table\">Latents</h2>\n<form id=\"filters\" aria-label=\"Filter latents\">");
    if report.is_pair() {
        out.push_str("<label>Group<select id=\"group\"><option value=\"\">all</option>");
        for group in [Some(Group::AOnly), Some(Group::Shared), Some(Group::BOnly), None] {
            put(out, format_args!("<option value=\"{}\">{}</option>", group_index(group), group_name(group)));
        }
        out.push_str("</select></label>");
    }
    out.push_str(
        "<label>Latents<input id=\"number\" inputmode=\"numeric\" placeholder=\"3, 17\" autocomplete=\"off\"></label>",
    );
    out.push_str("<fieldset><label class=\"limit\">Limit<select id=\"column\">");
    for (c, column) in columns.iter().enumerate().filter(|(_, column)| matches!(column.kind, Kind::Number(_))) {
        put(out, format_args!("<option value=\"{c}\">{}</option>", escape(&column.label)));
    }
    out.push_str(
        "</select></label><label>at least<input id=\"low\" inputmode=\"decimal\" autocomplete=\"off\"></label>\
         <label>at most<input id=\"high\" inputmode=\"decimal\" autocomplete=\"off\"></label></fieldset>\
         <button type=\"reset\">Reset</button></form>\n<output id=\"said\" aria-live=\"polite\"></output>\
         <noscript><p>This table is drawn by a script in this file. The same numbers are in the JSON and CSV that \
         <code>crosscoder report --json F --csv F</code> writes.</p></noscript>\n",
    );
    let most_digits = report.activations.as_ref().map_or(1, |stats| largest_row(stats).to_string().len());
    let width = |column: &Shown| match column.kind {
        Kind::Latent => 88,
        Kind::Group => 130,
        Kind::Number(_) => 104,
        // Digits, a comma and a space each.
        Kind::Rows { count, .. } => 40 + count * 8 * (most_digits + 2),
    };
    let total: usize = columns.iter().map(width).sum();
    put(
        out,
        format_args!(
            "<div class=\"scroll\" id=\"scroll\" tabindex=\"0\" role=\"region\" aria-labelledby=\"table\">\
             <table id=\"latents\" style=\"min-width:{total}px\"><colgroup>"
        ),
    );
    columns.iter().for_each(|column| put(out, format_args!("<col style=\"width:{}px\">", width(column))));
    out.push_str("</colgroup><thead><tr>");
    for column in &columns {
        let (label, meaning) = (escape(&column.label), escape(&column.meaning));
        let left = matches!(column.kind, Kind::Group | Kind::Rows { .. });
        let class = if left { " class=\"l\"" } else { "" };
        match column.kind {
            Kind::Rows { .. } => {
                put(
                    out,
                    format_args!(
                        "<th scope=\"col\"{class} title=\"{meaning}\"><span class=\"head\">{label}</span></th>"
                    ),
                );
            }
            _ => {
                let sort = if matches!(column.kind, Kind::Latent) { "ascending" } else { "none" };
                put(
                    out,
                    format_args!(
                        "<th scope=\"col\"{class} aria-sort=\"{sort}\" title=\"{meaning}\"><button \
                         type=\"button\">{label}</button></th>"
                    ),
                );
            }
        }
    }
    out.push_str("</tr></thead><tbody></tbody></table></div>\n<details><summary>What the columns mean</summary><ul>");
    for column in &columns {
        put(out, format_args!("<li><b>{}</b>: {}</li>", escape(&column.label), escape(&column.meaning)));
    }
    out.push_str(
        "</ul><p class=\"soft\">A dash stands for what is not defined: a cosine with a zero vector, the mean \
    of a latent that never fires. \
                  Numbers carry 16 significant bits here, all of them in JSON and CSV.</p></details></section>\n",
    );
    put(out, format_args!("<script id=\"data\" type=\"application/json\">{}</script>\n", block(report, &columns)));
}

/// The table's data as JSON that may stand in a script element.
fn block(report: &Report, columns: &[Shown]) -> String {
    let mut bytes = Vec::new();
    let mut described = Vec::new();
    for column in columns {
        described.push(match &column.kind {
            Kind::Latent => json!({"type": "latent"}),
            Kind::Group => json!({"type": "group", "left": true}),
            Kind::Number(_) => json!({"type": "f24"}),
            Kind::Rows { bytes, count } => json!({"type": "rows", "bytes": bytes, "count": count, "left": true}),
        });
        match &column.kind {
            Kind::Latent => {}
            Kind::Group => bytes.extend(report.latents().map(|h| group_index(report.group(h)) as u8)),
            Kind::Number(values) => values.iter().for_each(|v| bytes.extend(f24(v.unwrap_or(f64::NAN)))),
            Kind::Rows { bytes: width, count } => {
                let latents = report.activations.iter().flat_map(|stats| &stats.latents);
                latents.for_each(|l| top_rows(&l.top, *width, *count, &mut bytes));
            }
        }
    }
    let groups = [Some(Group::AOnly), Some(Group::Shared), Some(Group::BOnly), None].map(group_name);
    let block = json!({
        "n": report.norms.d_hidden(),
        "groups": groups,
        "columns": described,
        "data": base64(&bytes),
    });
    in_script(&block)
}

/// JSON in which no `<` can end or open an element.
fn in_script(value: &Value) -> String {
    value.to_string().replace('<', "\\u003c")
}

fn top_rows(top: &[TopRow], width: usize, count: usize, out: &mut Vec<u8>) {
    for k in 0..count {
        let row = top.get(k).map_or(u64::MAX, |t| t.row);
        out.extend(&row.to_le_bytes()[..width]);
    }
}

/// The upper three bytes of a float32, rounded to nearest even; infinite beyond float32.
fn f24(v: f64) -> [u8; 3] {
    let v = v as f32;
    let bits = v.to_bits();
    // Rounding may carry into infinity, as it should, but must not make an infinity of nan.
    let bits = if v.is_nan() { 0x7fc0_0000 } else { bits + (0x7f + ((bits >> 8) & 1)) };
    let [_, a, b, c] = bits.to_le_bytes();
    [a, b, c]
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for three in bytes.chunks(3) {
        let word = three.iter().enumerate().fold(0u32, |word, (i, &b)| word | u32::from(b) << (16 - 8 * i));
        for i in 0..4 {
            let digit = DIGITS[(word >> (18 - 6 * i)) as usize & 63];
            out.push(if i <= three.len() { digit as char } else { '=' });
        }
    }
    out
}

/// The cfg and the names, in a part that is closed at first.
fn settings(report: &Report, out: &mut String) {
    out.push_str(
        "<section><details><summary>Settings of the crosscoder (cfg)</summary><div class=\"plain\"><table><tbody>",
    );
    for (key, value) in report.cfg.keys() {
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        put(
            out,
            format_args!(
                "<tr><th scope=\"row\"><code>{}</code></th><td class=\"l\"><code>{}</code></td></tr>",
                escape(key),
                escape(&text)
            ),
        );
    }
    out.push_str("</tbody></table></div></details></section>\n");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f24_rounds_to_sixteen_bits() {
        let back = |v: f64| {
            let [a, b, c] = f24(v);
            f64::from(f32::from_le_bytes([0, a, b, c]))
        };
        for v in [0.0, -0.0, 1.0, 0.3, -123456.78, 1e-30, 65535.0, 2f64.powi(-140)] {
            assert!((back(v) - v).abs() <= (v.abs() * 2f64.powi(-16)).max(2f64.powi(-142)), "{v}: {}", back(v));
        }
        assert_eq!(back(1.0 + 2f64.powi(-16)), 1.0, "half way, to even");
        assert_eq!(back(1.0 + 3.0 * 2f64.powi(-16)), 1.0 + 4.0 * 2f64.powi(-16), "half way, to even");
        assert_eq!(
            [back(f64::from(f32::MAX)), back(1e300), back(f64::NEG_INFINITY)],
            [f64::INFINITY, f64::INFINITY, f64::NEG_INFINITY]
        );
        assert!(back(f64::NAN).is_nan() && back(-f64::NAN).is_nan());
    }

    #[test]
    fn base64_is_that_of_rfc_4648() {
        let texts = ["", "f", "fo", "foo", "foob", "fooba", "foobar"].map(|text| base64(text.as_bytes()));
        assert_eq!(texts, ["", "Zg==", "Zm8=", "Zm9v", "Zm9vYg==", "Zm9vYmE=", "Zm9vYmFy"]);
        assert_eq!(base64(&[0xfb, 0xff, 0xbf]), "+/+/");
    }

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!([median(vec![3.0, 1.0, 2.0]), median(vec![4.0, 1.0, 2.0, 3.0])], [2.0, 2.5]);
        assert!(median(vec![]).is_nan());
    }
}
