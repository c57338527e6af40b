//! BatchTopK at inference: a latent counts only where it exceeds a threshold.
//!
//! ```text
//! acts[b,h] = v if v · n[h] > threshold, 0 otherwise,     v = relu(x · W_enc + b_enc)[b,h]
//! ```
//!
//! `n[h]` is made of the decoder's norms, as the cfg key `code_normalization` says:
//!
//! | value | n\[h\] |
//! | --- | --- |
//! | `CROSSCODER` | `Σ_m ‖W_dec[h,m]‖` |
//! | `SAE` | `√(Σ_m ‖W_dec[h,m]‖²)` |
//! | `MIXED` | `code_normalization_alpha_sae` · SAE + `code_normalization_alpha_cc` · CROSSCODER |
//! | `NONE` | 1 |
//!
//! In training the k · batch largest of `v · n` counted; `threshold` is the running mean of the smallest that did. The
//! threshold is a constant: it has no gradient, and latents that it cuts pass none on. The original has nothing of this
//! and ignores the keys; it is the `BatchTopKCrossCoder` of the `dictionary_learning` fork, see [`crate::layouts`].

use crate::backend::{Backend, Scalar, Shaped};
use crate::config::Config;
use crate::error::{Error, Result};

/// The cfg key of the threshold. Without it a latent counts wherever it is above zero.
pub const THRESHOLD_KEY: &str = "batch_topk_threshold";
/// The cfg key of k, which training used; nothing reads it.
pub const K_KEY: &str = "batch_topk_k";
/// The cfg key of [`CodeNormalization`].
pub const CODE_NORMALIZATION_KEY: &str = "code_normalization";
/// The cfg keys of MIXED's two factors: of SAE, of CROSSCODER.
pub const ALPHA_KEYS: [&str; 2] = ["code_normalization_alpha_sae", "code_normalization_alpha_cc"];

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
            "MIXED" => Ok(CodeNormalization::Mixed { sae: cfg.number(ALPHA_KEYS[0])?, cc: cfg.number(ALPHA_KEYS[1])? }),
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
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BatchTopK {
    /// `batch_topk_threshold`
    pub threshold: f64,
    /// `code_normalization`
    pub code_normalization: CodeNormalization,
}

impl BatchTopK {
    /// What the cfg says, if it has a threshold.
    ///
    /// # Errors
    /// A threshold that is no number; one without a code normalization that is known.
    pub fn from_cfg(cfg: &Config) -> Result<Option<Self>> {
        if cfg.get(THRESHOLD_KEY).is_none() {
            return Ok(None);
        }
        let threshold = cfg.number(THRESHOLD_KEY)?;
        let code_normalization = CodeNormalization::from_name(cfg.text(CODE_NORMALIZATION_KEY)?, cfg)?;
        Ok(Some(BatchTopK { threshold, code_normalization }))
    }

    /// Writes the keys that [`BatchTopK::from_cfg`] reads.
    pub fn set_in(&self, cfg: &mut Config) {
        cfg.set(THRESHOLD_KEY, self.threshold);
        cfg.set(CODE_NORMALIZATION_KEY, self.code_normalization.name());
        if let CodeNormalization::Mixed { sae, cc } = self.code_normalization {
            cfg.set(ALPHA_KEYS[0], sae);
            cfg.set(ALPHA_KEYS[1], cc);
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
        // n[h] = r(Σ_m r(‖W_dec[h,m]‖)), over `groups` parts of a row
        let norms = |groups: usize| -> Result<Vec<B::Scalar>> {
            let (mut norms, mut sums) = <(B::Matrix, B::Matrix)>::default();
            backend.group_norms(w_dec, groups, &mut norms)?;
            backend.row_sums(&norms, &mut sums)?;
            let mut out = vec![B::Scalar::default(); sums.shape().1];
            backend.download(&sums, 0, &mut out)?;
            Ok(out)
        };
        let factors = match self.code_normalization {
            CodeNormalization::Crosscoder => norms(n_models)?,
            CodeNormalization::Sae => norms(1)?,
            CodeNormalization::Mixed { sae, cc } => {
                let mixed = |(s, c)| r(r(s * narrow(sae)) + r(c * narrow(cc)));
                norms(1)?.into_iter().zip(norms(n_models)?).map(mixed).collect()
            }
            CodeNormalization::None => vec![narrow(1.0); w_dec.shape().0],
        };
        backend.keep_above(acts, &factors, narrow(self.threshold))
    }
}
