//! Adam and gradient clipping, with the arithmetic of PyTorch's single-tensor path.
//!
//! Checked operation by operation against PyTorch 2.15 on the CPU: in float16 and bfloat16 the formulas of
//! [`Backend::adam`] give PyTorch's bits but for some three elements in a million. In float32 `m` and `v` have its bits where the
//! processor fuses a product and a sum, as PyTorch does; `p` may differ in the last place, since PyTorch's square root is not
//! correctly rounded everywhere. The total norm differs by the order of the sum; the coefficient has its bits.

use crate::autodiff::{PARAMETER_NAMES, Parameters};
use crate::backend::{AdamStep, Backend, Scalar, Shaped};
use crate::dtype::Dtype;
use crate::error::Result;
use crate::tensor::Values;
use half::{bf16, f16};

/// The `eps` of `torch.optim.Adam`.
pub const ADAM_EPS: f64 = 1e-8;

/// What `clip_grad_norm_` adds to the total norm, so that a zero norm divides nothing.
const CLIP_EPS: f64 = 1e-6;

/// What [`clip_grad_norm`] found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Clip<S> {
    /// The norm of each gradient, in the order of [`PARAMETER_NAMES`].
    pub norms: [S; 4],
    /// The norm of all gradients together, before clipping: what `clip_grad_norm_` returns.
    pub total_norm: S,
    /// What every gradient is multiplied with, 1 at most.
    pub coef: S,
}

/// The norm of the gradients, and the factor that brings it down to `max_norm`:
///
/// ```text
/// norm_i = r(‖grad_i‖)
/// total  = r(√(Σ norm_i²))
/// coef   = min(r(r(1 / r(total + r(1e-6))) · max_norm), 1)
/// ```
///
/// Gradients are left as they are: [`Backend::adam`] multiplies with `coef`, also where it is 1, as PyTorch does.
/// nan stays nan. Original: `torch.nn.utils.clip_grad_norm_`. Golden: `train.grad_norm`.
///
/// # Errors
/// Those of the device.
pub fn clip_grad_norm<B: Backend>(
    backend: &B,
    grads: &Parameters<B::Matrix>,
    max_norm: f64,
) -> Result<Clip<B::Scalar>> {
    let narrow = B::Scalar::narrow;
    let mut norms = [narrow(0.0); 4];
    for (norm, grad) in norms.iter_mut().zip(grads.each()) {
        *norm = backend.norm(grad)?;
    }
    let total: f64 = norms.iter().map(|n| n.wide() * n.wide()).sum();
    let total_norm = backend.round(narrow(total.sqrt()));
    let reciprocal = backend.round(narrow(1.0) / backend.round(total_norm + backend.round(narrow(CLIP_EPS))));
    let coef = backend.round(reciprocal * narrow(max_norm));
    // `coef > 1` is false for nan: torch.clamp passes nan on.
    let coef = if coef > narrow(1.0) { narrow(1.0) } else { coef };
    Ok(Clip { norms, total_norm, coef })
}

/// Adam's two moments.
#[derive(Clone, Debug)]
pub struct Moments<M> {
    /// `exp_avg`
    pub exp_avg: Parameters<M>,
    /// `exp_avg_sq`
    pub exp_avg_sq: Parameters<M>,
}

/// Adam's state: the moments of the four parameters, in the parameters' dtype and shapes, and the number of steps taken.
/// Original: `torch.optim.Adam(params, lr, betas)`.
#[derive(Clone, Debug)]
pub struct Adam<B: Backend> {
    beta1: f64,
    beta2: f64,
    pub(crate) steps: u64,
    pub(crate) moments: Moments<B::Matrix>,
}

impl<B: Backend> Adam<B> {
    /// Adam before its first step: all moments are zero.
    ///
    /// # Errors
    /// Those of the device.
    pub fn new(backend: &B, params: &Parameters<B::Matrix>, beta1: f64, beta2: f64) -> Result<Self> {
        let zeros = || -> Result<Parameters<B::Matrix>> {
            let mut zeros = Parameters::default();
            for (zero, param) in zeros.each_mut().into_iter().zip(params.each()) {
                let (rows, cols) = param.shape();
                *zero = backend.upload(rows, cols, zero_values(backend.dtype(), rows * cols))?;
            }
            Ok(zeros)
        };
        Ok(Adam { beta1, beta2, steps: 0, moments: Moments { exp_avg: zeros()?, exp_avg_sq: zeros()? } })
    }

    /// The number of steps taken.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// One step with this learning rate, gradients multiplied with `clip.coef`; formulas at [`Backend::adam`].
    /// Original: `optimizer.step()`.
    ///
    /// # Errors
    /// Those of the device.
    pub fn step(
        &mut self,
        backend: &B,
        params: &mut Parameters<B::Matrix>,
        grads: &Parameters<B::Matrix>,
        clip: &Clip<B::Scalar>,
        lr: f64,
    ) -> Result<()> {
        self.steps += 1;
        // Python's `beta ** step`, both in float64.
        let step = self.steps as f64;
        let bias_correction1 = 1.0 - self.beta1.powf(step);
        let bias_correction2 = 1.0 - self.beta2.powf(step);
        let narrow = B::Scalar::narrow;
        let step = AdamStep {
            clip: clip.coef,
            one_minus_beta1: narrow(1.0 - self.beta1),
            beta2: narrow(self.beta2),
            one_minus_beta2: narrow(1.0 - self.beta2),
            step_size: narrow(lr / bias_correction1),
            bias_correction2_sqrt: narrow(bias_correction2.sqrt()),
            // A number that is added to a tensor is rounded to its dtype; one that multiplies it is not.
            eps: backend.round(narrow(ADAM_EPS)),
        };
        let Moments { exp_avg, exp_avg_sq } = &mut self.moments;
        let moments = exp_avg.each_mut().into_iter().zip(exp_avg_sq.each_mut());
        for ((param, grad), (m, v)) in params.each_mut().into_iter().zip(grads.each()).zip(moments) {
            backend.adam(param, grad, m, v, &step)?;
        }
        Ok(())
    }
}

/// The name of the first that is not finite, by its norm.
pub(crate) fn first_not_finite<S: Scalar>(norms: &[S; 4]) -> Option<&'static str> {
    norms.iter().zip(PARAMETER_NAMES).find(|(norm, _)| !norm.is_finite()).map(|(_, name)| name)
}

fn zero_values(dtype: Dtype, count: usize) -> Values {
    match dtype {
        Dtype::F16 => Values::F16(vec![f16::ZERO; count]),
        Dtype::BF16 => Values::BF16(vec![bf16::ZERO; count]),
        _ => Values::F32(vec![0.0; count]),
    }
}
