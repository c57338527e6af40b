//! The layouts that published crosscoders come in. What the weights mean is the same; here they become the original's four.
//!
//! | layout | tensors | cfg |
//! | --- | --- | --- |
//! | the original's | `W_enc` [2, d_in, dict_size], `W_dec` [dict_size, 2, d_in], `b_enc`, `b_dec` | its own |
//! | Neel Nanda's | the same, n_layers instead of 2, scaling factors folded in | lacks `d_in` |
//! | one tensor for each model | `W_enc_A`, … [d_in, dict_size], `W_dec_A`, … [dict_size, d_in], `b_dec_A`, …, `b_enc` | any |
//! | the fork's | `encoder.weight` [n, d_in, dict_size], `decoder.weight` [n, dict_size, d_in], biases, buffers | `config.json` |
//!
//! The fork is science-of-finetuning's of `dictionary_learning`, its classes `CrossCoder` and `BatchTopKCrossCoder`.
//! Separate tensors may also be named `_a`, `_b`, … or `_0`, `_1`, …, in upper or lower case. A prefix `_orig_mod.`, which
//! `torch.compile` leaves, is dropped. A layout is told by names and shapes; one that is known and not supported is named in
//! the error, and nothing is guessed where a file leaves something open.
//!
//! **Normalisation is folded.** The fork's model normalises what it reads and undoes that in what it writes. With the stored
//! mean `μ[m,d]` and the stored scales `s[m]`, in older files one for all,
//!
//! ```text
//! x'[m,d] = (x[m,d] - μ[m,d]) · s[m]           rec[m,d] = rec'[m,d] / (s[m] + 1e-8) + μ[m,d]
//! ```
//!
//! both are linear, so the same function of x is
//!
//! ```text
//! W_enc[m,d,h] = s[m] · W_enc'[m,d,h]          b_enc[h]   = b_enc'[h] - Σ_{m,d} μ[m,d] · W_enc[m,d,h]
//! W_dec[h,m,d] = W_dec'[h,m,d] / (s[m] + 1e-8) b_dec[m,d] = b_dec'[m,d] / (s[m] + 1e-8) + μ[m,d]
//! ```
//!
//! Latents stay what they are. Files from before these scales have a standard deviation `σ[m,d]` for each neuron instead: there
//! `s` is `1 / (σ[m,d] + 1e-8)` on the left and its exact inverse on the right. What is folded is computed in float64 and stored
//! in float32. The threshold of BatchTopK is compared with latents times the norms of `W_dec'`, so the cfg gets `s[m] + 1e-8`,
//! see [`crate::batch_topk`]. For σ there is no such factor, and a threshold on norms is refused.
//!
//! The l1 term stays the original's, `Σ_m ‖W_dec[h,m]‖`, whatever code normalization a model was trained with.

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

use crate::autodiff::{PARAMETER_NAMES, Parameters};
use crate::batch_topk::{self, BatchTopK, CODE_NORMALIZATION_KEY, CodeNormalization};
use crate::config::Config;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::files::{TensorFile, TensorInfo};
use crate::tensor::{Tensor, Values};
use serde_json::{Value, json};
use std::collections::HashSet;
use std::path::Path;

/// The cfg key that names the layout a checkpoint was converted from.
pub const LAYOUT_KEY: &str = "layout";

/// The cfg key that says what normalisation is folded into the weights.
pub const FOLDED_KEY: &str = "folded_activation_normalisation";

/// What `torch.compile` puts before each name.
const COMPILED_PREFIX: &str = "_orig_mod.";

/// The fork's `CodeNormalization`, whose members count from 1.
const CODE_NORMALIZATIONS: [&str; 5] = ["CROSSCODER", "SAE", "MIXED", "NONE", "DECOUPLED"];

/// What the fork adds to scales before it divides by them.
const FORK_EPS: f64 = 1e-8;

/// A layout that is supported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Layout {
    /// The original's four tensors, for any number of models.
    Original,
    /// The four, with a tensor for each model.
    PerModel,
    /// The `dictionary_learning` fork's.
    DictionaryLearning,
}

impl Layout {
    /// Its name in the cfg.
    pub fn name(self) -> &'static str {
        match self {
            Layout::Original => "crosscoder",
            Layout::PerModel => "one tensor per model",
            Layout::DictionaryLearning => "dictionary_learning",
        }
    }
}

/// The layout that these names and shapes are, if they are weights at all.
///
/// # Errors
/// A layout that is known and not supported.
pub fn recognise(tensors: &[TensorInfo]) -> Result<Option<Layout>> {
    let shape = |name: &str| tensors.iter().find(|t| bare(&t.name) == name).map(|t| &t.shape[..]);
    let any = |names: &[&'static str]| names.iter().find(|name| shape(name).is_some()).copied();
    let refuse = |what: String| Err(Error::unsupported(format!("{what} is not supported")));
    let [fork_encoder, encoder] = [shape("encoder.weight"), shape("W_enc")];
    if fork_encoder.is_some() || encoder.is_some() {
        if let Some(name) = any(&["r_mag", "b_mag", "b_gate", "gate_bias", "mag_bias"]) {
            return refuse(format!("a gated autoencoder ({name})"));
        }
        if let Some(shape @ [_, _]) = fork_encoder.or(encoder) {
            let kind = match any(&["threshold", "log_threshold", "W_skip"]) {
                Some("W_skip") => "a transcoder",
                Some(_) if shape_is_one(tensors, "threshold") => "a BatchTopK SAE of one model",
                Some(_) => "a JumpReLU SAE of one model",
                None => "an SAE or transcoder of one model",
            };
            return refuse(format!("{kind} (its encoder has shape {shape:?}; a crosscoder's has one more dimension)"));
        }
    }
    if let Some(shape) = encoder {
        if let Some(name) = any(&["threshold", "log_threshold"]) {
            return refuse(format!("a JumpReLU crosscoder ({name} beside W_enc {shape:?})"));
        }
        return Ok(Some(Layout::Original));
    }
    if fork_encoder.is_some() && shape("decoder.weight").is_some() {
        return Ok(Some(Layout::DictionaryLearning));
    }
    if tensors.iter().any(|t| per_model(bare(&t.name)).is_some_and(|(kind, _)| kind == "W_enc")) {
        return Ok(Some(Layout::PerModel));
    }
    // A file of the original's that lacks a tensor: its reader says which.
    Ok(tensors.iter().any(|t| PARAMETER_NAMES.contains(&bare(&t.name))).then_some(Layout::Original))
}

fn shape_is_one(tensors: &[TensorInfo], name: &str) -> bool {
    tensors.iter().any(|t| bare(&t.name) == name && t.shape.iter().all(|&size| size == 1))
}

fn bare(name: &str) -> &str {
    name.strip_prefix(COMPILED_PREFIX).unwrap_or(name)
}

/// `W_enc_A` as `("W_enc", "a")`, also in lower case; `b_enc` is one for all and is none of these.
fn per_model(name: &str) -> Option<(&'static str, String)> {
    let lower = name.to_ascii_lowercase();
    let (stem, model) = lower.rsplit_once('_')?;
    let kind = PARAMETER_NAMES.into_iter().find(|kind| kind.eq_ignore_ascii_case(stem))?;
    Some((kind, model.to_owned()))
}

/// Reads the weights and completes the cfg, so that both are of the original's layout; `cfg_path` is for messages. Keys of the
/// cfg are kept: those of another layout's in one object under its name.
///
/// # Errors
/// Weights of no layout that is known, or of one that is not supported; a cfg that contradicts them.
pub fn read(file: &mut TensorFile, cfg: Config, cfg_path: &Path) -> Result<(Config, Parameters<Tensor>)> {
    let path = file.path().to_owned();
    let layout = recognise(file.tensors()).map_err(|e| e.in_file(&path))?;
    let mut tensors = Named::new(file)?;
    match layout {
        Some(Layout::DictionaryLearning) => fork(&mut tensors, cfg, cfg_path).map_err(|e| e.in_file(&path)),
        Some(Layout::PerModel) => {
            refuse_other_functions(&cfg).map_err(|e| e.in_file(cfg_path))?;
            let weights = separate(&mut tensors).map_err(|e| e.in_file(&path))?;
            Ok((completed(cfg, &weights, Layout::PerModel), weights))
        }
        Some(Layout::Original) | None => {
            refuse_other_functions(&cfg).map_err(|e| e.in_file(cfg_path))?;
            let weights = original(&mut tensors).map_err(|e| e.in_file(&path))?;
            let mut cfg = cfg;
            // Neel Nanda's has it from the language model.
            if let (None, &[_, d_in, _]) = (cfg.get("d_in"), weights.w_enc.shape()) {
                cfg.set("d_in", d_in);
            }
            Ok((cfg, weights))
        }
    }
}

/// Keys by which other libraries say that a model computes something else than relu of a linear map.
fn refuse_other_functions(cfg: &Config) -> Result<()> {
    let keys: [(&str, &[&str]); 5] = [
        ("activation", &["relu"]),
        ("activation_fn", &["relu"]),
        ("activation_fn_str", &["relu"]),
        ("architecture", &["standard", "crosscoder"]),
        ("normalize_activations", &["none"]),
    ];
    for (key, known) in keys {
        if let Some(Value::String(value)) = cfg.get(key)
            && !known.contains(&value.to_ascii_lowercase().as_str())
        {
            let what = format!("cfg key {key:?} is {value:?}, which is not supported; only {}", known.join(", "));
            return Err(Error::unsupported(what));
        }
    }
    Ok(())
}

/// The tensors of a file by their names, each taken once.
struct Named<'a> {
    file: &'a mut TensorFile,
    /// Without the prefix, and whether it was taken.
    names: Vec<(String, bool)>,
}

impl<'a> Named<'a> {
    fn new(file: &'a mut TensorFile) -> Result<Self> {
        let names: Vec<_> = file.tensors().iter().map(|t| (bare(&t.name).to_owned(), false)).collect();
        let mut seen = HashSet::new();
        for (name, _) in &names {
            if !seen.insert(name) {
                let what = format!("two tensors have the name {name:?}, with and without {COMPILED_PREFIX:?}");
                return Err(Error::format(what).in_file(file.path()));
            }
        }
        Ok(Named { file, names })
    }

    fn get(&mut self, name: &str) -> Result<Option<Tensor>> {
        let Some(index) = self.names.iter().position(|(known, _)| known == name) else { return Ok(None) };
        if let Some((_, taken)) = self.names.get_mut(index) {
            *taken = true;
        }
        self.file.read_of_all(index).map(Some)
    }

    fn need(&mut self, name: &str) -> Result<Tensor> {
        self.get(name)?.ok_or_else(|| Error::format(format!("{name} is missing")))
    }

    /// A tensor of one number.
    fn number(&mut self, name: &str) -> Result<Option<f64>> {
        let Some(tensor) = self.get(name)? else { return Ok(None) };
        match tensor.to_f64_vec()[..] {
            [number] => Ok(Some(number)),
            _ => Err(Error::shape(format!("{name} has shape {:?}; it needs one number", tensor.shape()))),
        }
    }

    /// Every tensor was taken: one that is not known may change what the others mean.
    fn nothing_left(&self, layout: &str) -> Result<()> {
        match self.names.iter().find(|(_, taken)| !taken) {
            Some((name, _)) => Err(Error::format(format!("holds a tensor {name:?}; {layout}"))),
            None => Ok(()),
        }
    }
}

fn original(tensors: &mut Named<'_>) -> Result<Parameters<Tensor>> {
    let known = |name: &str| PARAMETER_NAMES.contains(&name);
    if let Some((other, _)) = tensors.names.iter().find(|(name, _)| !known(name)) {
        let found = format!("holds a tensor {other:?}; a crosscoder has {}", PARAMETER_NAMES.join(", "));
        return Err(Error::format(found));
    }
    let [w_enc, w_dec, b_enc, b_dec] = PARAMETER_NAMES;
    let mut need = |name| tensors.need(name);
    Ok(Parameters { w_enc: need(w_enc)?, w_dec: need(w_dec)?, b_enc: need(b_enc)?, b_dec: need(b_dec)? })
}

/// One tensor for each model and kind, models in the order of their letters or numbers.
fn separate(tensors: &mut Named<'_>) -> Result<Parameters<Tensor>> {
    let [w_enc, w_dec, b_enc, b_dec] = PARAMETER_NAMES;
    let names: Vec<String> = tensors.names.iter().map(|(name, _)| name.clone()).collect();
    let of = |kind: &str| -> Vec<(String, &String)> {
        let mut of: Vec<_> = names
            .iter()
            .filter_map(|name| per_model(name).filter(|(k, _)| *k == kind).map(|(_, model)| (model, name)))
            .collect();
        of.sort_by_key(|(model, _)| (model.len(), model.clone()));
        of
    };
    if let Some((_, name)) = of(b_enc).first() {
        let what = format!("an encoder bias for each model ({name}) is not supported: a crosscoder has one");
        return Err(Error::unsupported(what));
    }
    let models: Vec<String> = of(w_enc).into_iter().map(|(model, _)| model).collect();
    let letters = (b'a'..=b'z').map(|c| char::from(c).to_string()).take(models.len());
    let numbers = (0..models.len()).map(|m| m.to_string());
    if !models.iter().cloned().eq(letters) && !models.iter().cloned().eq(numbers) {
        let what = format!("models are named {}; known are A, B, … and 0, 1, …", models.join(", "));
        return Err(Error::unsupported(what));
    }
    let mut stacked = |kind: &str| -> Result<Tensor> {
        let of = of(kind);
        if !of.iter().map(|(model, _)| model).eq(&models) {
            let found: Vec<_> = of.iter().map(|(_, name)| name.as_str()).collect();
            let what =
                format!("{kind} is there as [{}]; it needs one for each of {}", found.join(", "), models.join(", "));
            return Err(Error::format(what));
        }
        let parts: Vec<Tensor> = of.iter().map(|(_, name)| tensors.need(name)).collect::<Result<_>>()?;
        stack(kind, &parts)
    };
    let (enc, dec, bias) = (stacked(w_enc)?, stacked(w_dec)?, stacked(b_dec)?);
    let b_enc_name = names.iter().find(|name| name.eq_ignore_ascii_case(b_enc)).map_or(b_enc, String::as_str);
    let b_enc = tensors.need(b_enc_name)?;
    tensors
        .nothing_left("with separate tensors for each model a crosscoder has W_enc_*, W_dec_*, b_dec_* and b_enc")?;
    if dec.shape().len() != 3 {
        return Err(Error::shape(format!("{w_dec}_* stacked have shape {:?}; they need 3 dimensions", dec.shape())));
    }
    Ok(Parameters { w_enc: enc, w_dec: dec.permuted(&[1, 0, 2]), b_enc, b_dec: bias })
}

/// Tensors of one shape and type as one, a new dimension first.
fn stack(kind: &str, parts: &[Tensor]) -> Result<Tensor> {
    let first = parts.first().ok_or_else(|| Error::format(format!("there is no {kind}")))?;
    for part in parts {
        if (part.shape(), part.dtype()) != (first.shape(), first.dtype()) {
            let [a, b] = [first, part].map(|t| format!("{} {:?}", t.dtype(), t.shape()));
            return Err(Error::shape(format!("the models' {kind} differ: {a} and {b}")));
        }
    }
    let mut values = Values::try_with_capacity(first.dtype(), parts.len().saturating_mul(first.len()))?;
    for part in parts {
        part.row_major_le_bytes(|bytes| {
            values.push_le_bytes(bytes);
            Ok::<(), Error>(())
        })?;
    }
    Tensor::new([&[parts.len()], first.shape()].concat(), values)
}

/// The cfg with the keys that the original's `CrossCoder(cfg)` needs, where they are missing: shapes and dtype from the weights,
/// and for the weights that it draws before it loads these, the original's defaults.
fn completed(mut cfg: Config, weights: &Parameters<Tensor>, layout: Layout) -> Config {
    let dtype = weights.w_enc.dtype().enc_name().unwrap_or("fp32");
    let mut set = |key: &str, value: Value| {
        if cfg.get(key).is_none() {
            cfg.set(key, value);
        }
    };
    if let &[_, d_in, dict_size] = weights.w_enc.shape() {
        set("d_in", d_in.into());
        set("dict_size", dict_size.into());
    }
    set("enc_dtype", dtype.into());
    for key in ["seed", "dec_init_norm"] {
        set(key, Config::default().get(key).cloned().unwrap_or_default());
    }
    set("device", "cpu".into());
    set(LAYOUT_KEY, layout.name().into());
    cfg
}

/// The fork's crosscoders: `encoder.weight` [n, d_in, dict_size], `encoder.bias` \[dict_size\], `decoder.weight`
/// [n, dict_size, d_in], `decoder.bias` [n, d_in], and the buffers of normalisation and BatchTopK.
fn fork(tensors: &mut Named<'_>, config: Config, config_path: &Path) -> Result<(Config, Parameters<Tensor>)> {
    // Published by its class: the arguments of `__init__`. Saved in training: what the trainer says of itself, one level down.
    let said = match config.get("trainer") {
        Some(Value::Object(trainer)) => Config::from_json(Value::Object(trainer.clone()).to_string().as_bytes())?,
        _ => config.clone(),
    };
    let [w_enc, b_enc, w_dec, b_dec] =
        ["encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"].map(|name| tensors.need(name));
    let (w_enc, b_enc, w_dec, b_dec) = (w_enc?, b_enc?, w_dec?, b_dec?);
    let &[n, d_in, dict_size] = w_enc.shape() else {
        return Err(Error::shape(format!("encoder.weight has shape {:?}; it needs 3 dimensions", w_enc.shape())));
    };
    match *w_dec.shape() {
        [m, h, d] if m != n && (h, d) == (dict_size, d_in) => {
            let what = format!("an encoder over a subset of layers ({n} of {m}) is not supported");
            return Err(Error::unsupported(what));
        }
        _ => {}
    }
    let needed = [("decoder.weight", &w_dec, &[n, dict_size, d_in][..]), ("encoder.bias", &b_enc, &[dict_size])];
    for (name, tensor, needed) in needed.into_iter().chain([("decoder.bias", &b_dec, &[n, d_in][..])]) {
        if (tensor.shape(), tensor.dtype()) != (needed, w_enc.dtype()) {
            let [found, other] = [tensor, &w_enc].map(|t| format!("{} {:?}", t.dtype(), t.shape()));
            let what = format!("{name} is {found}; encoder.weight, {other}, needs {} {needed:?}", w_enc.dtype());
            return Err(Error::shape(what));
        }
    }
    if !matches!(w_enc.dtype(), Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16) {
        return Err(Error::unsupported(format!("encoder.weight has dtype {}; weights are floats", w_enc.dtype())));
    }
    let said = with_names_of_today(said);
    let in_config = |e: Error| e.in_file(config_path);
    check_config(&said, [n, d_in, dict_size]).map_err(in_config)?;

    let code_normalization = code_normalization(tensors.number("code_normalization_id")?, &said).map_err(in_config)?;
    let batch_topk = batch_topk(tensors, &said, code_normalization.as_deref(), dict_size).map_err(in_config)?;
    let normalisation = Normalisation::read(tensors, [n, d_in])?;
    let k = tensors.number("k")?;
    tensors.nothing_left("its layout is known as the dictionary_learning fork's, which has none of that name")?;

    let weights = Parameters { w_enc, w_dec: w_dec.permuted(&[1, 0, 2]), b_enc, b_dec };
    let mut cfg = completed(Config::from_json(b"{}")?, &weights, Layout::DictionaryLearning);
    if let (Some(mut batch_topk), Some(k)) = (batch_topk, k) {
        match normalisation.as_ref().map(|normalisation| &normalisation.scale) {
            Some(Scale::PerModel(scales)) => {
                let divisors: Vec<f64> = scales.iter().map(|s| s + FORK_EPS).collect();
                batch_topk = batch_topk.for_divided_decoder(&divisors);
            }
            Some(Scale::PerNeuron(_)) if batch_topk.code_normalization != CodeNormalization::None => {
                return Err(Error::unsupported(format!(
                    "BatchTopK with code normalization {} on activations normalised for each neuron is not supported: \
                     folding changes the decoder norms that its threshold is compared with",
                    batch_topk.code_normalization.name()
                )));
            }
            Some(Scale::PerNeuron(_)) | None => {}
        }
        batch_topk.set_in(&mut cfg);
        cfg.set(batch_topk::K_KEY, k as u64);
    } else if let Some(name) = code_normalization {
        cfg.set(CODE_NORMALIZATION_KEY, name);
    }
    let weights = match normalisation {
        Some(normalisation) => {
            cfg.set("enc_dtype", "fp32");
            cfg.set(FOLDED_KEY, normalisation.record());
            normalisation.fold(weights)?
        }
        None => weights,
    };
    cfg.set(Layout::DictionaryLearning.name(), Value::Object(config.keys().clone()));
    Ok((cfg, weights))
}

/// The keys of a code normalization had other names until May 2025, when it was `LossType.SAE` where it now is `SAE`.
fn with_names_of_today(mut said: Config) -> Config {
    let [alpha_sae, alpha_cc] = batch_topk::ALPHA_KEYS;
    let renamed = [
        ("sparsity_loss_type", CODE_NORMALIZATION_KEY),
        ("sparsity_loss_alpha_sae", alpha_sae),
        ("sparsity_loss_alpha_cc", alpha_cc),
    ];
    for (old, new) in renamed {
        if let (Some(value), None) = (said.get(old), said.get(new)) {
            let text = value.as_str().map(|text| text.strip_prefix("LossType.").unwrap_or(text).to_owned());
            let value = text.map_or_else(|| value.clone(), Value::from);
            said.set(new, value);
        }
    }
    said
}

/// What the config says must be what the tensors are.
fn check_config(said: &Config, [n, d_in, dict_size]: [usize; 3]) -> Result<()> {
    for (key, found) in [("num_layers", n), ("activation_dim", d_in), ("dict_size", dict_size)] {
        if said.get(key).is_some() && said.count(key)? != found {
            return Err(Error::config(format!("key {key:?} is {}; the weights have {found}", said.count(key)?)));
        }
    }
    if let Some(class) = said.get("dict_class").and_then(Value::as_str)
        && !["CrossCoder", "BatchTopKCrossCoder"].contains(&class)
    {
        return Err(Error::unsupported(format!("a model of the class {class:?} is not supported")));
    }
    match said.get("encoder_layers") {
        None | Some(Value::Null) => {}
        Some(layers) if *layers == json!((0..n).collect::<Vec<_>>()) => {}
        Some(layers) => {
            let what = format!("an encoder over a subset of layers (encoder_layers {layers}) is not supported");
            return Err(Error::unsupported(what));
        }
    }
    match said.get("latent_processor") {
        None | Some(Value::Null) => Ok(()),
        Some(other) => Err(Error::unsupported(format!("a latent_processor ({other}) is not supported"))),
    }
}

/// The name of the code normalization, from the buffer and from the config, which must agree; none if neither has it.
fn code_normalization(id: Option<f64>, said: &Config) -> Result<Option<String>> {
    let from_config = match said.get(CODE_NORMALIZATION_KEY) {
        None | Some(Value::Null) => None,
        Some(_) => Some(said.text(CODE_NORMALIZATION_KEY)?.to_ascii_uppercase()),
    };
    let from_buffer = match id {
        None => None,
        Some(id) => {
            let name = (1..).zip(CODE_NORMALIZATIONS).find(|(number, _)| f64::from(*number) == id);
            let unknown = || Error::unsupported(format!("code_normalization_id {id} is not known; 1 to 5 are"));
            Some(name.ok_or_else(unknown)?.1.to_owned())
        }
    };
    if let (Some(config), Some(buffer)) = (&from_config, &from_buffer)
        && config != buffer
    {
        return Err(Error::config(format!("code normalization {config}; the weights have {buffer}")));
    }
    let name = from_buffer.or(from_config);
    if name.as_deref() == Some("DECOUPLED") {
        CodeNormalization::from_name("DECOUPLED", said)?;
    }
    Ok(name)
}

/// The threshold, if the model has one, before anything is folded.
fn batch_topk(
    tensors: &mut Named<'_>,
    said: &Config,
    code_normalization: Option<&str>,
    dict_size: usize,
) -> Result<Option<BatchTopK>> {
    let has = |name: &str| tensors.names.iter().any(|(known, _)| known == name);
    let class = said.get("dict_class").and_then(Value::as_str);
    match (has("k"), has("threshold"), class) {
        (false, false, None | Some("CrossCoder")) => return Ok(None),
        (true, true, None | Some("BatchTopKCrossCoder")) => {}
        (_, false, _) => {
            return Err(Error::unsupported("a TopK crosscoder without a threshold is not supported"));
        }
        (false, true, _) => return Err(Error::unsupported("a threshold without k is of no layout that is known")),
        (true, true, Some(class)) => {
            return Err(Error::config(format!("dict_class {class:?}; the weights have k and a threshold")));
        }
    }
    if let Some(tensor) = tensors.file.tensors().iter().find(|t| bare(&t.name) == "threshold")
        && tensor.shape == [dict_size]
        && dict_size > 1
    {
        return Err(Error::unsupported("a threshold for each latent (JumpReLU) is not supported"));
    }
    let threshold = tensors.number("threshold")?.filter(|t| t.is_finite());
    let threshold = threshold.ok_or_else(|| Error::format("the threshold is not finite"))?;
    let name = code_normalization.ok_or_else(|| {
        Error::config(format!(
            "what the threshold is compared with is not said: the weights have no code_normalization_id, so the config \
             needs {CODE_NORMALIZATION_KEY:?} (its own library assumes \"CROSSCODER\")"
        ))
    })?;
    let code_normalization = CodeNormalization::from_name(name, said)?;
    Ok(Some(BatchTopK { threshold, code_normalization, norm_scales: None }))
}

/// What the fork's model does to activations before and after; see the module.
struct Normalisation {
    /// [n, d_in]
    mean: Vec<f64>,
    scale: Scale,
    d_in: usize,
}

enum Scale {
    /// `activation_global_scale` [n]
    PerModel(Vec<f64>),
    /// `activation_std` + 1e-8 [n, d_in]
    PerNeuron(Vec<f64>),
}

impl Normalisation {
    /// The buffers, if there are any and they are used: nan stands for none.
    fn read(tensors: &mut Named<'_>, [n, d_in]: [usize; 2]) -> Result<Option<Self>> {
        let (mean, std) = (tensors.get("activation_mean")?, tensors.get("activation_std")?);
        let (scale, rms) = (tensors.get("activation_global_scale")?, tensors.number("target_rms")?);
        let (mean, std) = match (mean, std) {
            (Some(mean), Some(std)) => (mean, std),
            (None, None) => return Ok(None),
            _ => return Err(Error::format("one of activation_mean and activation_std is missing")),
        };
        for (name, tensor) in [("activation_mean", &mean), ("activation_std", &std)] {
            if tensor.shape() != [n, d_in] {
                return Err(Error::shape(format!("{name} has shape {:?}; it needs [{n}, {d_in}]", tensor.shape())));
            }
        }
        let (mean, std) = (mean.to_f64_vec(), std.to_f64_vec());
        let nans = mean.iter().chain(&std).filter(|v| v.is_nan()).count();
        if nans == mean.len().saturating_add(std.len()) {
            return Ok(None);
        }
        if mean.iter().chain(&std).any(|v| !v.is_finite()) {
            return Err(Error::format(
                "activation_mean and activation_std have elements that are not finite, and others",
            ));
        }
        let scale = match scale {
            None => Scale::PerNeuron(std.iter().map(|std| std + FORK_EPS).collect()),
            Some(scale) => {
                let (scales, all) = (scale.to_f64_vec(), scale.shape().is_empty());
                if !all && scale.shape() != [n] {
                    let found = scale.shape();
                    return Err(Error::shape(format!(
                        "activation_global_scale has shape {found:?}; it needs [] or [{n}]"
                    )));
                }
                if scales.iter().any(|s| !(s.is_finite() && *s > 0.0)) {
                    return Err(Error::format(format!("activation_global_scale is {scales:?}")));
                }
                // What they are made of. 1 stands for "normalise each neuron" too, which is saved nowhere.
                let expected =
                    |std: &[f64]| rms.unwrap_or(1.0) / (std.iter().map(|v| v * v).sum::<f64>() + FORK_EPS).sqrt();
                let of: Vec<f64> =
                    std.chunks(if all { n.saturating_mul(d_in) } else { d_in }.max(1)).map(expected).collect();
                if scales.iter().all(|s| *s == 1.0) && of.iter().any(|s| (s - 1.0).abs() > 1e-3) {
                    return Err(Error::unsupported(format!(
                        "activation_global_scale is 1, activation_std gives {of:?}: whether each neuron is divided by its own \
                         deviation is not said in the file"
                    )));
                }
                Scale::PerModel(if all { scales.repeat(n) } else { scales })
            }
        };
        Ok(Some(Normalisation { mean, scale, d_in }))
    }

    /// What becomes of the cfg key [`FOLDED_KEY`].
    fn record(&self) -> Value {
        match &self.scale {
            Scale::PerModel(scales) => json!({"mean": true, "activation_global_scale": scales}),
            Scale::PerNeuron(_) => json!({"mean": true, "activation_std": true}),
        }
    }

    /// The weights that take x and reconstruct x, by the formulas of the module. W_enc [n, d_in, dict_size], W_dec
    /// [dict_size, n, d_in].
    #[allow(clippy::indexing_slicing, clippy::arithmetic_side_effects)] // The caller has checked the shapes; no size is 0.
    fn fold(&self, weights: Parameters<Tensor>) -> Result<Parameters<Tensor>> {
        let (width, d_in) = (self.mean.len(), self.d_in);
        let (before, after): (Vec<f64>, Vec<f64>) = match &self.scale {
            Scale::PerModel(scales) => {
                let each = |f: &dyn Fn(f64) -> f64| (0..width).map(|k| f(scales[k / d_in])).collect();
                (each(&|s| s), each(&|s| 1.0 / (s + FORK_EPS)))
            }
            Scale::PerNeuron(std) => (std.iter().map(|std| 1.0 / std).collect(), std.clone()),
        };
        let Parameters { w_enc, w_dec, b_enc, b_dec } = weights;
        let (n, dict_size) = (width / d_in, b_enc.len());
        let f32_of = |tensor: Tensor| tensor.into_row_major().into_values().into_f32();

        let mut b_enc = b_enc.to_f64_vec();
        let mut enc = f32_of(w_enc);
        for (k, row) in enc.chunks_exact_mut(dict_size.max(1)).enumerate() {
            // k runs over (m, d)
            for (w, b) in row.iter_mut().zip(&mut b_enc) {
                let folded = before[k] * f64::from(*w);
                *b -= self.mean[k] * folded;
                *w = folded as f32;
            }
        }
        let mut dec = f32_of(w_dec.permuted(&[1, 0, 2]));
        for (i, row) in dec.chunks_exact_mut(d_in.max(1)).enumerate() {
            // i runs over (m, h)
            let m = i / dict_size.max(1);
            for (w, after) in row.iter_mut().zip(&after[m * d_in..]) {
                *w = (f64::from(*w) * after) as f32;
            }
        }
        let bias = b_dec.to_f64_vec();
        let bias = (0..width).map(|k| (bias[k] * after[k] + self.mean[k]) as f32).collect();
        let tensor = |shape: &[usize], values| Tensor::new(shape.to_vec(), Values::F32(values));
        Ok(Parameters {
            w_enc: tensor(&[n, d_in, dict_size], enc)?,
            w_dec: tensor(&[n, dict_size, d_in], dec)?.permuted(&[1, 0, 2]),
            b_enc: tensor(&[dict_size], b_enc.into_iter().map(|b| b as f32).collect())?,
            b_dec: tensor(&[n, d_in], bias)?,
        })
    }
}
