//! The original's cfg: a JSON object, every key kept in its place, also unknown ones, and written back as Python writes it.

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

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use serde_json::{Map, Number, Value};

/// The cfg dictionary of the original, as `k_cfg.json` holds it.
///
/// A typed getter reads a key when it is needed and says which key is missing or ill-typed; keys that nothing reads are
/// kept and written back. The class needs `d_in`, `dict_size`, `enc_dtype`, `seed` and `dec_init_norm`; training needs more.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    keys: Map<String, Value>,
}

/// The keys of the original's `default_cfg` (`train.py`) with its defaults, in its order; `d_in` is Gemma 2 2B's.
pub const DEFAULT_CFG: &str = concat!(
    r#"{"seed": 49, "batch_size": 4096, "buffer_mult": 128, "lr": 5e-05, "num_tokens": 400000000, "l1_coeff": 2, "#,
    r#""beta1": 0.9, "beta2": 0.999, "d_in": 2304, "dict_size": 16384, "seq_len": 1024, "enc_dtype": "fp32", "#,
    r#""model_name": "gemma-2-2b", "site": "resid_pre", "device": "cuda:0", "model_batch_size": 4, "log_every": 100, "#,
    r#""save_every": 30000, "dec_init_norm": 0.08, "hook_point": "blocks.14.hook_resid_pre", "#,
    r#""wandb_project": "YOUR_WANDB_PROJECT", "wandb_entity": "YOUR_WANDB_ENTITY"}"#
);

impl Default for Config {
    /// The original's `default_cfg`, see [`DEFAULT_CFG`].
    #[allow(clippy::expect_used)] // A constant, which a test reads.
    fn default() -> Self {
        Self::from_json(DEFAULT_CFG.as_bytes()).expect("DEFAULT_CFG is an object")
    }
}

impl Config {
    /// Reads a cfg. Python's `NaN` and `Infinity`, which are no JSON, are refused. An integer beyond 64 bits becomes the nearest
    /// float, and is written back as that.
    ///
    /// # Errors
    /// Bytes that are not one JSON object. Of a key that stands twice the last value counts, as in Python.
    pub fn from_json(bytes: &[u8]) -> Result<Self> {
        match serde_json::from_slice(bytes) {
            Ok(Value::Object(keys)) => Ok(Config { keys }),
            Ok(other) => Err(Error::config(format!("a cfg must be a JSON object, found {}", kind(&other)))),
            Err(e) => Err(Error::config("a cfg must be a JSON object").with_source(e)),
        }
    }

    /// The cfg as Python's `json.dump` writes it: one line, `", "` and `": "` between, non-ASCII escaped, no newline.
    pub fn to_json(&self) -> String {
        let mut out = String::new();
        python_json(&Value::Object(self.keys.clone()), &mut out);
        out
    }

    /// All keys, in their order.
    pub fn keys(&self) -> &Map<String, Value> {
        &self.keys
    }

    /// The value of a key, if it is there.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.keys.get(key)
    }

    /// Sets a key, in its place if it is there, at the end otherwise.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) {
        self.keys.insert(key.to_owned(), value.into());
    }

    /// Removes a key; the others keep their places.
    pub fn remove(&mut self, key: &str) -> Option<Value> {
        self.keys.shift_remove(key)
    }

    /// Sets a key from the command line's text, as a number, bool or string as the key's present value has it; a new key
    /// becomes whatever JSON the text is, a string otherwise. Original: `arg_parse_update_cfg`.
    ///
    /// # Errors
    /// Text that is not of the type of the key's present value.
    pub fn set_text(&mut self, key: &str, text: &str) -> Result<()> {
        let parsed: Option<Value> = serde_json::from_str(text).ok().or_else(|| {
            // What Python's float() takes and JSON does not: `5e-5` both do, `.5`, `1.` and `+1` only Python.
            text.parse::<f64>().ok().and_then(Number::from_f64).map(Value::Number)
        });
        let value = match (self.keys.get(key), parsed) {
            (Some(Value::String(_)), _) => Value::String(text.to_owned()),
            (Some(old @ (Value::Number(_) | Value::Bool(_))), Some(new)) if kind(old) == kind(&new) => new,
            (Some(old @ (Value::Number(_) | Value::Bool(_))), _) => {
                return Err(
                    Error::config(format!("needs {}, found {text:?}", kind(old))).at(format!("cfg key {key:?}"))
                );
            }
            (_, Some(new)) => new,
            (_, None) => Value::String(text.to_owned()),
        };
        self.set(key, value);
        Ok(())
    }

    fn need(&self, key: &str) -> Result<&Value> {
        self.keys.get(key).ok_or_else(|| Error::config(format!("cfg key {key:?} is missing")))
    }

    fn ill_typed(key: &str, needed: &str, found: &Value) -> Error {
        let found = if found.is_null() { "null".to_owned() } else { format!("{} {found}", kind(found)) };
        Error::config(format!("cfg key {key:?} needs {needed}, found {found}"))
    }

    /// A key that holds a count: an integer from 0.
    ///
    /// # Errors
    /// If it is missing or no such integer.
    pub fn count(&self, key: &str) -> Result<usize> {
        let value = self.need(key)?;
        value
            .as_u64()
            .and_then(|n| usize::try_from(n).ok())
            .ok_or_else(|| Self::ill_typed(key, "an integer of 0 or more", value))
    }

    /// A key that holds a size: an integer from 1.
    ///
    /// # Errors
    /// If it is missing or no such integer.
    pub fn size(&self, key: &str) -> Result<usize> {
        let value = self.need(key)?;
        let size = value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|&n| n > 0);
        size.ok_or_else(|| Self::ill_typed(key, "an integer of 1 or more", value))
    }

    /// A key that holds a finite number, an integer included.
    ///
    /// # Errors
    /// If it is missing or no number.
    pub fn number(&self, key: &str) -> Result<f64> {
        let value = self.need(key)?;
        value.as_f64().filter(|v| v.is_finite()).ok_or_else(|| Self::ill_typed(key, "a finite number", value))
    }

    /// A key that holds a string.
    ///
    /// # Errors
    /// If it is missing or no string.
    pub fn text(&self, key: &str) -> Result<&str> {
        let value = self.need(key)?;
        value.as_str().ok_or_else(|| Self::ill_typed(key, "a string", value))
    }

    /// `d_in`: the width of one model's activations.
    ///
    /// # Errors
    /// If it is missing or no integer of 1 or more.
    pub fn d_in(&self) -> Result<usize> {
        self.size("d_in")
    }

    /// `dict_size`: the number of latents, `d_hidden`.
    ///
    /// # Errors
    /// If it is missing or no integer of 1 or more.
    pub fn dict_size(&self) -> Result<usize> {
        self.size("dict_size")
    }

    /// `n_models`: the number of models; 2 if the key is missing. The original has no such key and always two.
    ///
    /// # Errors
    /// If it is no integer of 1 or more.
    pub fn n_models(&self) -> Result<usize> {
        if self.get("n_models").is_none() { Ok(2) } else { self.size("n_models") }
    }

    /// `enc_dtype`: the type of the parameters.
    ///
    /// # Errors
    /// If it is missing or none of `fp32`, `fp16`, `bf16`.
    pub fn enc_dtype(&self) -> Result<Dtype> {
        Dtype::from_enc_name(self.text("enc_dtype")?).map_err(|e| e.at("cfg"))
    }

    /// `seed`: what `torch.manual_seed` takes, an integer from -2^63 to 2^64 - 1.
    ///
    /// # Errors
    /// If it is missing or no such integer.
    pub fn seed(&self) -> Result<i128> {
        let value = self.need("seed")?;
        let seed = value.as_i64().map(i128::from).or(value.as_u64().map(i128::from));
        seed.ok_or_else(|| Self::ill_typed("seed", "an integer from -2^63 to 2^64 - 1", value))
    }
}

/// What a JSON value is, in words.
fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a bool",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// Appends `value` as Python's `json.dumps` with its defaults prints it.
pub(crate) fn python_json(value: &Value, out: &mut String) {
    match value {
        Value::Null => out.push_str("null"),
        Value::Bool(b) => out.push_str(if *b { "true" } else { "false" }),
        Value::Number(n) => python_number(n, out),
        Value::String(s) => python_string(s, out),
        Value::Array(items) => {
            out.push('[');
            for (i, item) in items.iter().enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                python_json(item, out);
            }
            out.push(']');
        }
        Value::Object(items) => {
            out.push('{');
            for (i, (key, item)) in items.iter().enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                python_string(key, out);
                out.push_str(": ");
                python_json(item, out);
            }
            out.push('}');
        }
    }
}

/// Appends a number as Python's `repr` has it: `5e-05`, `0.08`, `1e+16`, `100000.0`, integers as such.
fn python_number(number: &Number, out: &mut String) {
    let value = match number.as_f64() {
        Some(value) if number.is_f64() => value,
        _ => return out.push_str(&number.to_string()),
    };
    // Rust's `{:e}` has the shortest digits that read back, as Python's repr has: "-1.25e-7".
    let text = format!("{value:e}");
    let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        out.push_str(&format!("{value:?}"));
    } else {
        let sign = if exponent < 0 { '-' } else { '+' };
        out.push_str(&format!("{mantissa}e{sign}{:02}", exponent.abs()));
    }
}

/// Appends a string with quotes, every character outside printable ASCII escaped.
fn python_string(text: &str, out: &mut String) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            ' '..='~' => out.push(c),
            _ => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    out.push_str(&format!("\\u{unit:04x}"));
                }
            }
        }
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_cfg_is_written_as_python_writes_it() {
        assert_eq!(Config::default().to_json(), DEFAULT_CFG);
    }

    #[test]
    fn every_key_is_kept_and_written_back_as_python_writes_it() {
        // Made by Python's json.dumps.
        let text = r#"{"b": 1e-05, "a": [1, 2.5, null, true], "\u00e9\ud83d\ude00": "\"\\\n\u007f", "n": {"x": -0.0, "y": 1e+16, "z": 9999999999999998.0, "w": 1.5e-07, "v": 0.0001, "big": 18446744073709551615}}"#;
        assert_eq!(Config::from_json(text.as_bytes()).unwrap().to_json(), text);
    }

    #[test]
    fn a_bad_key_is_named() {
        let cfg =
            Config::from_json(br#"{"d_in": -3, "dict_size": 0, "seed": 1.5, "enc_dtype": 5, "lr": "x"}"#).unwrap();
        for (error, needle) in [
            (cfg.d_in().unwrap_err(), "\"d_in\" needs an integer of 1 or more, found a number -3"),
            (cfg.dict_size().unwrap_err(), "\"dict_size\" needs an integer of 1 or more, found a number 0"),
            (cfg.seed().unwrap_err(), "\"seed\" needs an integer"),
            (cfg.enc_dtype().unwrap_err(), "\"enc_dtype\" needs a string"),
            (cfg.number("lr").unwrap_err(), "\"lr\" needs a finite number"),
            (cfg.count("batch_size").unwrap_err(), "\"batch_size\" is missing"),
        ] {
            assert!(error.to_string().contains(needle), "{error}");
        }
        for bytes in [&b"[1]"[..], b"", b"{", b"{} {}", b"\xff", b"null"] {
            assert!(Config::from_json(bytes).is_err());
        }
    }

    #[test]
    fn seeds_span_what_torch_takes() {
        for (text, seed) in [("-9223372036854775808", -(1i128 << 63)), ("18446744073709551615", (1i128 << 64) - 1)] {
            let cfg = Config::from_json(format!("{{\"seed\": {text}}}").as_bytes()).unwrap();
            assert_eq!(cfg.seed().unwrap(), seed);
        }
        assert!(Config::from_json(br#"{"seed": 18446744073709551616}"#).unwrap().seed().is_err());
    }

    #[test]
    fn text_takes_the_type_that_the_key_has() {
        let mut cfg = Config::default();
        cfg.set_text("lr", "1e-3").unwrap();
        cfg.set_text("model_name", "12").unwrap();
        cfg.set_text("note", "hello").unwrap();
        assert_eq!(cfg.number("lr").unwrap(), 1e-3);
        assert_eq!(cfg.text("model_name").unwrap(), "12");
        assert_eq!(cfg.text("note").unwrap(), "hello");
        assert!(cfg.set_text("lr", "fast").unwrap_err().to_string().contains("lr"));
    }
}
