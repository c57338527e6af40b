//! BatchTopK at inference: a latent counts only where it exceeds a threshold.
//!
//! ```text
//! acts[b,h] = v if v · n[h] > threshold, 0 otherwise,     v = relu(x · W_enc + b_enc)[b,h]
//! ```
//!
//! computed in the weights' dtype, as the fork does: `n[h]` and the product are rounded to it, the threshold is not.
//! `n[h]` is made of the decoder's norms, as the cfg key `code_normalization` says:
//!
//! | value | n\[h\] |
//! | --- | --- |
//! | `CROSSCODER` | `Σ_m ‖W_dec[h,m]‖` |
//! | `SAE` | `√(Σ_m ‖W_dec[h,m]‖²)` |
//! | `MIXED` | `code_normalization_alpha_sae` · SAE + `code_normalization_alpha_cc` · CROSSCODER |
//! | `NONE` | 1 |
//!
//! In it `‖W_dec[h,m]‖` stands for `c[m] · ‖W_dec[h,m]‖` where the cfg key `decoder_norm_scales` has a number `c` for each model:
//! where activation scales were folded into the decoder, whose norms the threshold does not mean.
//!
//! In training the k · batch largest of `v · n` counted; `threshold` is the running mean of the smallest that did. The
//! threshold is a constant: it has no gradient, and latents that it cuts pass none on. The original has nothing of this
//! and ignores the keys; it is the `BatchTopKCrossCoder` of the `dictionary_learning` fork, see [`crate::layouts`].

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

use crate::backend::{Backend, Scalar, Shaped};
use crate::config::Config;
use crate::error::{Error, Result};
use serde_json::Value;

/// The cfg key of the threshold. Without it a latent counts wherever it is above zero.
pub const THRESHOLD_KEY: &str = "batch_topk_threshold";
/// The cfg key of k, which training used; nothing reads it.
pub const K_KEY: &str = "batch_topk_k";
/// The cfg key of [`CodeNormalization`].
pub const CODE_NORMALIZATION_KEY: &str = "code_normalization";
/// The cfg keys of MIXED's two factors: of SAE, of CROSSCODER.
pub const ALPHA_KEYS: [&str; 2] = ["code_normalization_alpha_sae", "code_normalization_alpha_cc"];
/// The cfg key of what each model's decoder norms are multiplied with; 1 where it is missing.
pub const NORM_SCALES_KEY: &str = "decoder_norm_scales";

/// What a latent is multiplied with before it is compared with the threshold; the module's table has the formulas.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum CodeNormalization {
    /// The sum of the decoder norms.
    Crosscoder,
    /// The norm of the decoder's whole row.
    Sae,
    /// A weighted sum of both.
    Mixed {
        /// The factor of [`CodeNormalization::Sae`].
        sae: f64,
        /// The factor of [`CodeNormalization::Crosscoder`].
        cc: f64,
    },
    /// Nothing: 1.
    None,
}

impl CodeNormalization {
    /// By its name; MIXED takes its factors from the cfg's keys [`ALPHA_KEYS`].
    ///
    /// # Errors
    /// Another name; DECOUPLED, whose latents are one set for each model; MIXED without its factors.
    pub fn from_name(name: &str, cfg: &Config) -> Result<Self> {
        match name {
            "CROSSCODER" => Ok(CodeNormalization::Crosscoder),
            "SAE" => Ok(CodeNormalization::Sae),
            "MIXED" => {
                let [sae, cc] = ALPHA_KEYS.map(|key| cfg.number(key));
                Ok(CodeNormalization::Mixed { sae: sae?, cc: cc? })
            }
            "NONE" => Ok(CodeNormalization::None),
            "DECOUPLED" => Err(Error::unsupported(
                "code normalization DECOUPLED: its latents differ between the models, a crosscoder has one set for all",
            )),
            _ => Err(Error::config(format!(
                "code normalization {name:?} is none of CROSSCODER, SAE, MIXED, NONE, DECOUPLED"
            ))),
        }
    }

    /// Its name in the cfg.
    pub fn name(self) -> &'static str {
        match self {
            CodeNormalization::Crosscoder => "CROSSCODER",
            CodeNormalization::Sae => "SAE",
            CodeNormalization::Mixed { .. } => "MIXED",
            CodeNormalization::None => "NONE",
        }
    }
}

/// The threshold of a crosscoder and what latents are multiplied with before they are compared with it.
#[derive(Clone, Debug, PartialEq)]
pub struct BatchTopK {
    /// `batch_topk_threshold`
    pub threshold: f64,
    /// `code_normalization`
    pub code_normalization: CodeNormalization,
    /// `decoder_norm_scales`, a number for each model; none stands for ones.
    pub norm_scales: Option<Vec<f64>>,
}

impl BatchTopK {
    /// What the cfg says, if it has a threshold.
    ///
    /// # Errors
    /// A threshold that is no number; one without a code normalization that is known; scales that are not one positive
    /// number for each model.
    pub fn from_cfg(cfg: &Config, n_models: usize) -> Result<Option<Self>> {
        if cfg.get(THRESHOLD_KEY).is_none() {
            return Ok(None);
        }
        let threshold = cfg.number(THRESHOLD_KEY)?;
        let code_normalization = CodeNormalization::from_name(cfg.text(CODE_NORMALIZATION_KEY)?, cfg)?;
        let norm_scales = match cfg.get(NORM_SCALES_KEY) {
            None => None,
            Some(value) => {
                let positive = |v: &Value| v.as_f64().filter(|c| c.is_finite() && *c > 0.0);
                let scales = value.as_array().and_then(|list| list.iter().map(positive).collect::<Option<Vec<f64>>>());
                Some(scales.filter(|scales| scales.len() == n_models).ok_or_else(|| {
                    let needs = format!("needs a list of {n_models} positive numbers, one for each model");
                    Error::config(format!("cfg key {NORM_SCALES_KEY:?} {needs}; found {value}"))
                })?)
            }
        };
        Ok(Some(BatchTopK { threshold, code_normalization, norm_scales }))
    }

    /// The same latents for a decoder whose models' parts were divided by these numbers.
    pub fn for_divided_decoder(mut self, divisors: &[f64]) -> Self {
        if self.code_normalization != CodeNormalization::None {
            let before = self.norm_scales.unwrap_or_else(|| vec![1.0; divisors.len()]);
            self.norm_scales = Some(before.iter().zip(divisors).map(|(c, divisor)| c * divisor).collect());
        }
        self
    }

    /// Writes the keys that [`BatchTopK::from_cfg`] reads.
    pub fn set_in(&self, cfg: &mut Config) {
        cfg.set(THRESHOLD_KEY, self.threshold);
        cfg.set(CODE_NORMALIZATION_KEY, self.code_normalization.name());
        if let CodeNormalization::Mixed { sae, cc } = self.code_normalization {
            ALPHA_KEYS.into_iter().zip([sae, cc]).for_each(|(key, factor)| cfg.set(key, factor));
        }
        if let Some(scales) = &self.norm_scales {
            cfg.set(NORM_SCALES_KEY, scales.clone());
        }
    }

    /// Sets the latents to 0 that do not exceed the threshold; nan stays. acts [batch, d_hidden], w_dec [d_hidden, width].
    pub(crate) fn cut<B: Backend>(
        &self,
        backend: &B,
        w_dec: &B::Matrix,
        n_models: usize,
        acts: &mut B::Latents,
    ) -> Result<()> {
        let (r, narrow) = (|v| backend.round(v), B::Scalar::narrow);
        let download = |matrix: &B::Matrix| -> Result<Vec<B::Scalar>> {
            let (rows, cols) = matrix.shape();
            let mut out = vec![B::Scalar::default(); rows.saturating_mul(cols)];
            backend.download(matrix, 0, &mut out)?;
            Ok(out)
        };
        // SAE's n[h] of the whole row, or CROSSCODER's of the models' parts
        let norms = |whole: bool| -> Result<Vec<B::Scalar>> {
            let (mut norms, mut sums) = <(B::Matrix, B::Matrix)>::default();
            let Some(scales) = &self.norm_scales else {
                backend.group_norms(w_dec, if whole { 1 } else { n_models }, &mut norms)?;
                backend.row_sums(&norms, &mut sums)?;
                return download(&sums);
            };
            backend.group_norms(w_dec, n_models, &mut norms)?;
            let of = |norms: &[B::Scalar]| {
                let scaled = norms.iter().zip(scales).map(|(norm, c)| c * norm.wide());
                r(narrow(if whole { scaled.map(|n| n * n).sum::<f64>().sqrt() } else { scaled.sum() }))
            };
            Ok(download(&norms)?.chunks_exact(n_models.max(1)).map(of).collect())
        };
        let factors = match self.code_normalization {
            CodeNormalization::Crosscoder => norms(false)?,
            CodeNormalization::Sae => norms(true)?,
            CodeNormalization::Mixed { sae, cc } => {
                #[allow(clippy::arithmetic_side_effects)] // Floats, which the lint cannot see of a generic.
                let mixed = |(s, c)| r(r(s * narrow(sae)) + r(c * narrow(cc)));
                norms(true)?.into_iter().zip(norms(false)?).map(mixed).collect()
            }
            CodeNormalization::None => vec![narrow(1.0); w_dec.shape().0],
        };
        backend.keep_above(acts, &factors, narrow(self.threshold))
    }
}
