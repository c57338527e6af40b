//! A tape for the loss: each operation's forward rule with its backward rule under it.
//!
//! ```text
//! acts = relu(x · W_enc + b_enc)              encode
//! rec  = acts · W_dec + b_dec                 decode
//! l2   = mean_b Σ_{m,d} (rec - x)²            squared_error
//! t[h] = Σ_m ‖W_dec[h,m]‖                     total_decoder_norm
//! l1   = mean_b Σ_h acts[b,h] · t[h]          weighted_l1
//! loss = l2 + l1_coeff · l1                   add_scaled
//! ```
//!
//! The tape decides where values round, as PyTorch's operations do; `r(…)` is told in [`crate::backend`]. It is kept
//! between steps: clearing it keeps the memory of its nodes, so that a step allocates nothing after the first.

use crate::backend::{Backend, Precision, Scalar, Shaped, Write};
use crate::error::Result;

/// The four parameters, their gradients, or anything else that there is one of for each.
///
/// Shapes on a backend: `W_enc`, `W_dec` [d_hidden, n_models · d_in], `b_enc` [1, d_hidden], `b_dec` [1, n_models · d_in].
#[derive(Clone, Debug, Default)]
pub struct Parameters<M> {
    /// `W_enc`
    pub w_enc: M,
    /// `W_dec`
    pub w_dec: M,
    /// `b_enc`
    pub b_enc: M,
    /// `b_dec`
    pub b_dec: M,
}

/// The parameters' names in files, formulas and messages, in the order of the original's `parameters()` and state dict.
pub const PARAMETER_NAMES: [&str; 4] = ["W_enc", "W_dec", "b_enc", "b_dec"];

impl<M> Parameters<M> {
    /// The four in the order of [`PARAMETER_NAMES`].
    pub fn each(&self) -> [&M; 4] {
        [&self.w_enc, &self.w_dec, &self.b_enc, &self.b_dec]
    }

    /// The four in the order of [`PARAMETER_NAMES`].
    pub fn each_mut(&mut self) -> [&mut M; 4] {
        [&mut self.w_enc, &mut self.w_dec, &mut self.b_enc, &mut self.b_dec]
    }

    /// From the four in the order of [`PARAMETER_NAMES`].
    pub fn from_each([w_enc, w_dec, b_enc, b_dec]: [M; 4]) -> Self {
        Parameters { w_enc, w_dec, b_enc, b_dec }
    }
}

/// A value on a tape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Var(usize);

enum Op<S> {
    Input,
    Encode { x: Var },
    Decode { acts: Var },
    SquaredError { rec: Var, x: Var },
    TotalDecoderNorm,
    WeightedL1 { acts: Var, t: Var },
    AddScaled { a: Var, b: Var, coeff: S },
}

enum Value<B: Backend> {
    Nothing,
    Matrix(B::Matrix),
    Latents(B::Latents),
    Scalar(B::Scalar),
}

impl<B: Backend> Value<B> {
    fn matrix(&self) -> &B::Matrix {
        match self {
            Value::Matrix(m) => m,
            _ => panic!("this value on the tape is no matrix"),
        }
    }

    fn latents(&self) -> &B::Latents {
        match self {
            Value::Latents(l) => l,
            _ => panic!("this value on the tape is no latents"),
        }
    }

    fn scalar(&self) -> B::Scalar {
        match self {
            Value::Scalar(s) => *s,
            _ => panic!("this value on the tape is no scalar"),
        }
    }

    /// The matrix to be written: the one of the last step, or a new one.
    fn matrix_mut(&mut self) -> &mut B::Matrix {
        if !matches!(self, Value::Matrix(_)) {
            *self = Value::Matrix(B::Matrix::default());
        }
        match self {
            Value::Matrix(m) => m,
            _ => unreachable!("made a matrix above"),
        }
    }

    fn latents_mut(&mut self) -> &mut B::Latents {
        if !matches!(self, Value::Latents(_)) {
            *self = Value::Latents(B::Latents::default());
        }
        match self {
            Value::Latents(l) => l,
            _ => unreachable!("made latents above"),
        }
    }
}

struct Node<B: Backend> {
    op: Op<B::Scalar>,
    value: Value<B>,
    /// What the backward rule needs beside values: the decoder norms.
    saved: B::Matrix,
}

/// A gradient, and whether anything was written to it in this backward pass.
struct Grad<B: Backend> {
    value: Value<B>,
    written: bool,
}

/// The operations of the loss in the order they were carried out.
pub struct Tape<B: Backend> {
    backend: B,
    nodes: Vec<Node<B>>,
    grads: Vec<Grad<B>>,
    used: usize,
}

impl<B: Backend> Tape<B> {
    /// An empty tape.
    pub fn new(backend: B) -> Self {
        Tape { backend, nodes: Vec::new(), grads: Vec::new(), used: 0 }
    }

    /// Forgets all values, keeps their memory.
    pub fn clear(&mut self) {
        self.used = 0;
    }

    /// A value that is a matrix.
    pub fn matrix(&self, v: Var) -> &B::Matrix {
        self.nodes[v.0].value.matrix()
    }

    /// A value that is latents.
    pub fn latents(&self, v: Var) -> &B::Latents {
        self.nodes[v.0].value.latents()
    }

    /// A value that is a number.
    pub fn scalar(&self, v: Var) -> B::Scalar {
        self.nodes[v.0].value.scalar()
    }

    /// Puts an operation on the tape; `forward` computes its value from the nodes before it.
    fn push(
        &mut self,
        op: Op<B::Scalar>,
        forward: impl FnOnce(&B, &[Node<B>], &mut Value<B>, &mut B::Matrix) -> Result<()>,
    ) -> Result<Var> {
        if self.used == self.nodes.len() {
            self.nodes.push(Node { op: Op::Input, value: Value::Nothing, saved: B::Matrix::default() });
            self.grads.push(Grad { value: Value::Nothing, written: false });
        }
        let (before, node) = self.nodes.split_at_mut(self.used);
        node[0].op = op;
        forward(&self.backend, before, &mut node[0].value, &mut node[0].saved)?;
        self.used += 1;
        Ok(Var(self.used - 1))
    }

    /// `r(x)`: a batch of activations, `values` [batch, width] row-major. It has no gradient. Original: `x.to(self.dtype)`.
    pub fn input(&mut self, batch: usize, width: usize, values: &[B::Scalar]) -> Result<Var> {
        self.push(Op::Input, |be, _, out, _| be.fill(batch, width, values, out.matrix_mut()))
    }

    /// The same of a batch that [`Backend::fill`] was called with already: `x` and the last such batch change places.
    pub fn staged(&mut self, x: &mut B::Matrix) -> Result<Var> {
        self.push(Op::Input, |_, _, out, _| {
            std::mem::swap(out.matrix_mut(), x);
            Ok(())
        })
    }

    /// `acts = relu(x · W_enc + b_enc)`. x [batch, width] → [batch, d_hidden]. Original: `encode`.
    pub fn encode(&mut self, p: &Parameters<B::Matrix>, x: Var) -> Result<Var> {
        self.push(Op::Encode { x }, |be, nodes, out, _| {
            be.encode(nodes[x.0].value.matrix(), &p.w_enc, &p.b_enc, out.latents_mut())
        })
    }

    /// `d_b_enc = r(Σ_b d_acts)`, `d_W_enc = r(d_actsᵀ · x)`; d_acts lives where relu lets it through.
    fn encode_backward(&mut self, i: usize, x: Var, d: &mut Gradients<'_, B>) -> Result<()> {
        let d_acts = self.grads[i].value.latents();
        self.backend.latents_column_sums(d_acts, &mut d.to.b_enc)?;
        let write = d.w_enc.next();
        self.backend.weight_grad(d_acts, self.nodes[x.0].value.matrix(), write, &mut d.to.w_enc)
    }

    /// Lets `f` set latents of `acts`, an encode, to 0. A gradient of latents lives where they are not 0, so what was cut passes
    /// none on, and this needs no rule of its own.
    pub fn cut(&mut self, acts: Var, f: impl FnOnce(&B, &mut B::Latents) -> Result<()>) -> Result<()> {
        f(&self.backend, self.nodes[acts.0].value.latents_mut())
    }

    /// `rec = acts · W_dec + b_dec`. acts [batch, d_hidden] → [batch, width]. Original: `decode`.
    pub fn decode(&mut self, p: &Parameters<B::Matrix>, acts: Var) -> Result<Var> {
        self.push(Op::Decode { acts }, |be, nodes, out, _| {
            be.decode(nodes[acts.0].value.latents(), &p.w_dec, &p.b_dec, out.matrix_mut())
        })
    }

    /// `d_b_dec = r(Σ_b d_rec)`, `d_W_dec = r(actsᵀ · d_rec)`, `d_acts = r(d_rec · W_decᵀ)`; `d_W_dec` together with what
    /// waits from the decoder norms.
    fn decode_backward(
        &mut self,
        i: usize,
        acts: Var,
        p: &Parameters<B::Matrix>,
        d: &mut Gradients<'_, B>,
    ) -> Result<()> {
        let (inputs, outputs) = self.grads.split_at_mut(i);
        let d_rec = outputs[0].value.matrix();
        let acts_value = self.nodes[acts.0].value.latents();
        self.backend.column_sums(d_rec, &mut d.to.b_dec)?;
        let write = d.w_dec.next();
        match d.norms.take() {
            Some(norms) => {
                let (d_t, norms) = (outputs[norms - i].value.matrix(), &self.nodes[norms].saved);
                self.backend.decoder_grad(acts_value, d_rec, &p.w_dec, norms, d_t, &mut d.to.w_dec)?;
            }
            None => self.backend.weight_grad(acts_value, d_rec, write, &mut d.to.w_dec)?,
        }
        let d_acts = &mut inputs[acts.0];
        let write = if std::mem::replace(&mut d_acts.written, true) { Write::Add } else { Write::Set };
        self.backend.latents_grad(d_rec, &p.w_dec, acts_value, write, d_acts.value.latents_mut())
    }

    /// `l2 = mean_b Σ_{m,d} (rec - x)²` in float32. Original: `l2_loss`.
    pub fn squared_error(&mut self, rec: Var, x: Var) -> Result<Var> {
        self.push(Op::SquaredError { rec, x }, |be, nodes, out, _| {
            let (rec, x) = (nodes[rec.0].value.matrix(), nodes[x.0].value.matrix());
            let per_row = be.squared_distances(rec, x, 0..rec.shape().1, Precision::F32)?;
            *out = Value::Scalar(mean(&per_row));
            Ok(())
        })
    }

    /// `d_rec = r((d_l2 / batch) · (2 · (rec - x)))`; it rounds where the original's `.float()` casts back.
    fn squared_error_backward(&mut self, i: usize, rec: Var, x: Var) -> Result<()> {
        let (inputs, outputs) = self.grads.split_at_mut(i);
        let (rec_value, x) = (self.nodes[rec.0].value.matrix(), self.nodes[x.0].value.matrix());
        let g = outputs[0].value.scalar() / B::Scalar::narrow(rec_value.shape().0 as f64);
        let d_rec = &mut inputs[rec.0];
        assert!(!d_rec.written, "the reconstruction has one use that has a gradient");
        d_rec.written = true;
        self.backend.squared_distances_grad(rec_value, x, g, d_rec.value.matrix_mut())
    }

    /// `t[h] = r(Σ_m r(‖W_dec[h,m]‖))` → [1, d_hidden]. Original: `total_decoder_norm`.
    pub fn total_decoder_norm(&mut self, p: &Parameters<B::Matrix>, n_models: usize) -> Result<Var> {
        self.push(Op::TotalDecoderNorm, |be, _, out, norms| {
            be.group_norms(&p.w_dec, n_models, norms)?;
            be.row_sums(norms, out.matrix_mut())
        })
    }

    /// `d_W_dec[h,m,d] = r(r(W_dec[h,m,d] / ‖W_dec[h,m]‖) · d_t[h])`, and 0 where the norm is 0, as PyTorch has it. It waits
    /// for the decoder's gradient, so that the backend can form both at once: [`Backend::decoder_grad`].
    fn total_decoder_norm_backward(&self, i: usize, d: &mut Gradients<'_, B>) {
        assert!(d.w_dec.0 && d.norms.is_none(), "the decoder norms are used once, after the decoder");
        d.norms = Some(i);
    }

    /// `l1 = r(mean_b r(Σ_h r(acts[b,h] · t[h])))`. Original: `l1_loss`.
    pub fn weighted_l1(&mut self, acts: Var, t: Var) -> Result<Var> {
        self.push(Op::WeightedL1 { acts, t }, |be, nodes, out, _| {
            let per_row = be.weighted_sums(nodes[acts.0].value.latents(), nodes[t.0].value.matrix())?;
            *out = Value::Scalar(be.round(mean(&per_row)));
            Ok(())
        })
    }

    /// With `g = r(d_l1 / batch)`: `d_acts[b,h] = r(g · t[h])`, `d_t[h] = r(Σ_b r(g · acts[b,h]))`.
    fn weighted_l1_backward(&mut self, i: usize, acts: Var, t: Var) -> Result<()> {
        let (acts_value, t_value) = (self.nodes[acts.0].value.latents(), self.nodes[t.0].value.matrix());
        let batch = B::Scalar::narrow(acts_value.shape().0 as f64);
        let g = self.backend.round(self.grads[i].value.scalar() / batch);
        let (d_acts, d_t) = two_mut(&mut self.grads, acts.0, t.0);
        assert!(!d_acts.written && !d_t.written, "the l1 term is the last use of acts and t on the tape");
        (d_acts.written, d_t.written) = (true, true);
        let (d_acts, d_t) = (d_acts.value.latents_mut(), d_t.value.matrix_mut());
        self.backend.weighted_sums_grad(acts_value, t_value, g, d_acts, d_t)
    }

    /// `a + r(coeff · b)`, a in float32, b in the dtype: the loss. Original: `l2_loss + l1_coeff * l1_loss`.
    pub fn add_scaled(&mut self, a: Var, coeff: f64, b: Var) -> Result<Var> {
        let coeff = B::Scalar::narrow(coeff);
        self.push(Op::AddScaled { a, b, coeff }, |be, nodes, out, _| {
            *out = Value::Scalar(nodes[a.0].value.scalar() + be.round(coeff * nodes[b.0].value.scalar()));
            Ok(())
        })
    }

    /// `d_a = g`, `d_b = r(coeff · r(g))`.
    fn add_scaled_backward(&mut self, i: usize, a: Var, b: Var, coeff: B::Scalar) {
        let g = self.grads[i].value.scalar();
        let d_b = self.backend.round(coeff * self.backend.round(g));
        self.grads[a.0] = Grad { value: Value::Scalar(g), written: true };
        self.grads[b.0] = Grad { value: Value::Scalar(d_b), written: true };
    }

    /// The gradients of the scalar `of` with respect to the parameters `p` that it was computed from, into `d`.
    /// Original: `loss.backward()` on cleared gradients.
    ///
    /// # Panics
    /// If the tape does not hold a decode, an encode and whatever else makes all four gradients.
    pub fn backward(&mut self, of: Var, p: &Parameters<B::Matrix>, d: &mut Parameters<B::Matrix>) -> Result<()> {
        let mut d = Gradients { to: d, w_enc: First(true), w_dec: First(true), norms: None };
        self.grads.iter_mut().for_each(|g| g.written = false);
        self.grads[of.0] = Grad { value: Value::Scalar(B::Scalar::narrow(1.0)), written: true };
        for i in (0..=of.0).rev() {
            if !self.grads[i].written {
                continue; // The loss does not depend on it, or it is an input.
            }
            match self.nodes[i].op {
                Op::Input => {}
                Op::Encode { x } => self.encode_backward(i, x, &mut d)?,
                Op::Decode { acts } => self.decode_backward(i, acts, p, &mut d)?,
                Op::SquaredError { rec, x } => self.squared_error_backward(i, rec, x)?,
                Op::TotalDecoderNorm => self.total_decoder_norm_backward(i, &mut d),
                Op::WeightedL1 { acts, t } => self.weighted_l1_backward(i, acts, t)?,
                Op::AddScaled { a, b, coeff } => self.add_scaled_backward(i, a, b, coeff),
            }
        }
        assert!(!d.w_enc.0 && !d.w_dec.0, "the tape holds no encode or no decode");
        Ok(())
    }
}

/// Where the gradients of the parameters go. The weights' are written whole by their first contribution.
struct Gradients<'a, B: Backend> {
    to: &'a mut Parameters<B::Matrix>,
    w_enc: First,
    w_dec: First,
    /// The node of the decoder norms, whose share of `d_W_dec` waits for the decoder's.
    norms: Option<usize>,
}

struct First(bool);

impl First {
    fn next(&mut self) -> Write {
        if std::mem::replace(&mut self.0, false) { Write::Set } else { Write::Add }
    }
}

fn two_mut<T>(items: &mut [T], i: usize, j: usize) -> (&mut T, &mut T) {
    let [a, b] = items.get_disjoint_mut([i, j]).expect("two different values on the tape");
    (a, b)
}

/// The mean, summed in float64 so that its error does not grow with the batch.
pub(crate) fn mean<S: Scalar>(values: &[S]) -> S {
    S::narrow(values.iter().map(|v| v.wide()).sum::<f64>() / values.len() as f64)
}
