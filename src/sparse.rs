//! Why the latents that are zero can be left out.
//!
//! After ReLU some tens of the thousands of latents are not zero. Let `S(b)` be the latents of row `b` that are not zero
//! (nan counts as not zero). Everything that follows `encode` is a sum in which a zero latent is a factor, or a gradient
//! that relu multiplies by zero outside of `S(b)`:
//!
//! | term | dense | on the support |
//! | --- | --- | --- |
//! | decode | `Σ_h acts[b,h] · W_dec[h,k]` | `Σ_{h ∈ S(b)}` |
//! | l1 | `Σ_h acts[b,h] · t[h]` | `Σ_{h ∈ S(b)}` |
//! | gradient of `W_dec` | `Σ_b acts[b,h] · d_rec[b,k]` | `Σ_{b: h ∈ S(b)}` |
//! | gradient of `W_enc` | `Σ_b d_pre[b,h] · x[b,k]` | `Σ_{b: h ∈ S(b)}`, as `d_pre[b,h] = 0` outside |
//! | gradient of `acts` | `Σ_k d_rec[b,k] · W_dec[h,k]` | needed for `h ∈ S(b)` alone |
//!
//! A term that is left out is `0 · y`. That is 0, and adding 0 changes no sum (a sum of nothing but -0 apart, whose sign
//! no formula here can see), **provided `y` is finite**: `0 · inf` and `0 · nan` are nan. So the terms that are left out
//! are the same in exact arithmetic and in floating point, and only the order of the remaining sums may differ from a dense
//! product. That holds for any number of zeros: where half of the latents are on, half of the terms can be left out. Where an
//! operand is not finite, backends take the dense product, and nan spreads as it does in the original (but for the gradient of
//! `t`, where the factor of the l1 loss is not finite).

/// Which way latents are held after `encode`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Path {
    /// The fastest, by the rule of the backend.
    #[default]
    Auto,
    /// Always dense products of all terms.
    Dense,
    /// Always the support, where the operands are finite.
    Sparse,
}
