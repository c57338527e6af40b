//! The log of a training run: `metrics.jsonl`, one JSON object per logged step.

#![forbid(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::arithmetic_side_effects
    )
)]

use super::figures::CURVES;
use crate::error::{Error, Result};
use crate::files::read_beside;
use serde_json::{Map, Value};
use std::collections::BTreeSet;
use std::path::Path;

/// A log longer than this is refused: room for 4,000,000 logged steps.
const LOG_BYTES: u64 = 1 << 30;

/// So many names are kept beside those that the original logs: each is a chart, and a number for each step, logged or not.
pub const MAX_NAMES: usize = 64;

/// Names times steps may be this many, and `PADDING` times the values that are there: a name that is logged once takes a number
/// for each step too.
const ROOM: usize = 1 << 22;
const PADDING: usize = 16;

/// Curves over the steps of a run, by the names that the original logs.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TrainingLog {
    /// The steps that were logged, ascending.
    pub steps: Vec<f64>,
    /// Name and values, in the order in which names first appear; nan where a step did not log the name.
    pub curves: Vec<(String, Vec<f64>)>,
    /// How many names are left out: those that appear after the first [`MAX_NAMES`], but for the original's.
    pub left_out: usize,
}

impl TrainingLog {
    /// Reads the `metrics.jsonl` at `path`, see [`Self::from_jsonl`].
    ///
    /// # Errors
    /// As there; a file that cannot be read, is not regular, has more than 1 GiB, or is not UTF-8.
    pub fn read(path: &Path) -> Result<Self> {
        let text =
            String::from_utf8(read_beside(path, LOG_BYTES)?).map_err(|e| Error::format("not UTF-8").with_source(e));
        text.and_then(|text| Self::from_jsonl(&text)).map_err(|e| e.in_file(path))
    }

    /// Reads `metrics.jsonl`: objects with the key `step` and any numbers. A step that does not lie above the ones
    /// before it replaces them (a run that was resumed from an older checkpoint). A last line without a newline that is
    /// no JSON is left out (a run that was cut off), and so are names beyond [`MAX_NAMES`].
    ///
    /// # Errors
    /// A line that is no object, or has no step; far more steps and names than values.
    pub fn from_jsonl(text: &str) -> Result<Self> {
        let mut log = TrainingLog::default();
        let (mut left_out, mut values) = (BTreeSet::new(), 0usize);
        let is_original = |key: &str| CURVES.iter().any(|(name, ..)| *name == key);
        for (i, line) in text.split_inclusive('\n').enumerate() {
            if line.trim().is_empty() {
                continue;
            }
            let at = |e: Error| e.at(format!("line {}", i.saturating_add(1)));
            let row: Map<String, Value> = match serde_json::from_str(line) {
                Ok(row) => row,
                Err(_) if !line.ends_with('\n') => break,
                Err(e) => return Err(at(Error::format("a logged step must be a JSON object").with_source(e))),
            };
            let step = row.get("step").and_then(Value::as_f64);
            let step = step.ok_or_else(|| at(Error::format("a logged step needs the number \"step\"")))?;
            log.truncate(log.steps.partition_point(|&s| s < step));
            for (key, value) in row.iter().filter(|(key, _)| *key != "step") {
                let Some(value) = value.as_f64() else { continue };
                let curve = match log.curves.iter().position(|(name, _)| name == key) {
                    Some(curve) => curve,
                    None if log.curves.len() >= MAX_NAMES && !is_original(key) => {
                        left_out.insert(key.clone());
                        continue;
                    }
                    None => {
                        log.curves.push((key.clone(), vec![f64::NAN; log.steps.len()]));
                        log.curves.len().saturating_sub(1)
                    }
                };
                if let Some((_, curve)) = log.curves.get_mut(curve) {
                    curve.push(value);
                    values = values.saturating_add(1);
                }
            }
            log.steps.push(step);
            let (names, steps) = (log.curves.len(), log.steps.len());
            let limit = values.saturating_mul(PADDING).saturating_add(ROOM);
            if names.saturating_mul(steps) > limit {
                return Err(at(Error::unsupported(format!(
                    "{names} names over {steps} steps, and only {values} values were logged; the limit on names times steps is \
                     {limit}"
                ))));
            }
            log.curves.iter_mut().for_each(|(_, values)| values.resize(log.steps.len(), f64::NAN));
        }
        log.left_out = left_out.len();
        Ok(log)
    }

    fn truncate(&mut self, len: usize) {
        self.steps.truncate(len);
        self.curves.iter_mut().for_each(|(_, values)| values.truncate(len));
    }

    /// The values of a name.
    pub fn curve(&self, name: &str) -> Option<&[f64]> {
        self.curves.iter().find(|(key, _)| key == name).map(|(_, values)| values.as_slice())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resumed_run_replaces_its_steps_and_a_cut_off_line_is_left_out() {
        let text = concat!(
            "{\"step\": 0, \"loss\": 3.0}\n\n{\"step\": 100, \"loss\": 2.5, \"note\": \"x\"}\n{\"step\": 200, \
             \"loss\": 9}\n",
            "{\"step\": 100, \"loss\": 2.0, \"lr\": null}\n{\"step\": 300, \"lr\": 1e-3}\n{\"step\": 400, \"lo"
        );
        let log = TrainingLog::from_jsonl(text).unwrap();
        assert_eq!(log.steps, [0.0, 100.0, 300.0]);
        assert_eq!(log.curve("loss").unwrap()[..2], [3.0, 2.0]);
        assert!(log.curve("loss").unwrap()[2].is_nan());
        assert_eq!(log.curve("lr").unwrap()[2], 1e-3);
        assert_eq!(log.curve("note"), None);
    }

    #[test]
    fn names_beyond_the_limit_are_counted_and_the_originals_are_kept() {
        let line = |i: usize| format!("{{\"step\": {i}, \"k{i}\": 1, \"k0\": 2}}\n");
        let text: String = (0..MAX_NAMES + 100).map(line).collect();
        let log = TrainingLog::from_jsonl(&(text + "{\"step\": 1000, \"loss\": 3.0, \"k163\": 1}\n")).unwrap();
        assert_eq!((log.curves.len(), log.left_out), (MAX_NAMES + 1, 100));
        assert_eq!(log.curve("loss").unwrap().last(), Some(&3.0));
        assert_eq!((log.curve("k63").map(<[f64]>::len), log.curve("k64")), (Some(MAX_NAMES + 101), None));
    }

    #[test]
    fn a_log_takes_no_more_than_its_values() {
        let head: String = (0..MAX_NAMES).map(|i| format!(", \"k{i}\": 1")).collect();
        let log = |steps: usize, line: fn(usize) -> String| {
            let lines: String = (1..steps).map(line).collect();
            TrainingLog::from_jsonl(&format!("{{\"step\": 0{head}}}\n{lines}")).map(|log| log.steps.len())
        };
        let bare = |step| format!("{{\"step\": {step}}}\n");
        assert_eq!(log(60_000, bare).unwrap(), 60_000);
        let said = log(80_000, bare).unwrap_err().to_string();
        assert!(said.starts_with("line 65553: 64 names over 65553 steps, and only 64 values were logged"), "{said}");
        // As a run logs: five values at each step.
        let full = |step| format!("{{\"step\": {step}, \"k0\": 1, \"k1\": 1, \"k2\": 1, \"k3\": 1, \"k4\": 1}}\n");
        assert_eq!(log(80_000, full).unwrap(), 80_000);
    }

    #[test]
    fn a_bad_line_is_named() {
        for text in [
            "{\"step\": 1}\n{\"step\": NaN}\n{\"step\": 2}\n",
            "{\"step\": 1}\n{\"loss\": 1}\n",
            "{\"step\": 1}\n[1]\n",
        ] {
            assert!(TrainingLog::from_jsonl(text).unwrap_err().to_string().starts_with("line 2: "));
        }
        assert_eq!(TrainingLog::from_jsonl("").unwrap(), TrainingLog::default());
    }
}
