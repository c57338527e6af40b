//! The shuffle buffer: `buffer.py` of the original, over rows that are read instead of models that are run.
//!
//! The buffer holds `batch_size · buffer_mult` rows in random order and hands them out from the start. Once half of them are
//! used, the first half is filled with the rows that follow in the set, and all are shuffled again. Rows are multiplied with
//! `√d_in / (mean norm)`, one factor per model, see [`crate::normalisation`].
//!
//! **Departures from the original**
//!
//! - *Refresh reads on.* The original's slice of new tokens ends at a count of this refresh while its start counts from the
//!   beginning of the set: after the first fill it is empty, and every refresh only shuffles the rows that are there.
//!   [`Refresh::Original`] reproduces that.
//! - *Rows, not sequences.* The original fills whole sequences of `seq_len - 1` tokens (the first, BOS, dropped) and rounds
//!   the buffer down to them. Here rows are the unit; whoever wrote the file has dropped what is not to be trained on.
//! - *The set ends.* The original would slice past its end. Here reading goes on at the first row; the shuffle of each
//!   refresh makes another order of it. A set that fits into the buffer is read once, and a refresh only shuffles it.
//! - *The dtype is the data's.* The original's buffer is bfloat16 always. Here rows keep the dtype of their file. Both hand out
//!   float32: the row cast to float32, times the factor in float32.
//! - *Refresh is late.* It happens before the batch that needs it, not after the one before: the same batches, and no
//!   reading after the last.
//!
//! As in the original, fewer than `batch_size` rows per refresh are overwritten unread, and the shuffle is
//! `torch.randperm` on the generator as `CrossCoder.__init__` left it: equal seed, rows and buffer size give equal batches.

use crate::activations::{Activations, append_f32};
use crate::config::Config;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::normalisation::scale_rows;
use crate::rng::Mt19937;
use crate::threads::{available, for_rows};
use half::{bf16, f16};
use serde_json::Value;
use std::sync::atomic::{AtomicBool, Ordering};

/// The extra cfg key that holds the share of rows to hold out.
pub const VAL_FRACTION_KEY: &str = "val_fraction";

/// The extra cfg key that asks for [`Refresh::Original`] if it is true.
pub const ORIGINAL_REFRESH_KEY: &str = "original_refresh";

/// A thread more must have so many elements to do, some tenth of a millisecond's work.
const THREAD_ELEMENTS: usize = 1 << 16;

/// What happens when half of the buffer is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Refresh {
    /// The used half is replaced by the rows that follow.
    #[default]
    ReadOn,
    /// Nothing new is read, as it happens in the original; the rows are shuffled.
    Original,
}

/// Which rows of a set are held out of training: the share `fraction`, spread evenly.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct HeldOut {
    fraction: f64,
}

impl HeldOut {
    /// The share that the cfg key `val_fraction` holds out; none without it.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn from_cfg(cfg: &Config) -> Result<Self> {
        match cfg.get(VAL_FRACTION_KEY) {
            Some(_) => Self::new(cfg.number(VAL_FRACTION_KEY)?),
            None => Ok(HeldOut::default()),
        }
    }

    /// Holds out `fraction` of the rows, from 0 to less than 1.
    ///
    /// # Errors
    /// Any other number.
    pub fn new(fraction: f64) -> Result<Self> {
        if !(0.0..1.0).contains(&fraction) {
            return Err(Error::usage(format!(
                "the validation fraction is {fraction}; it must be from 0 to less than 1"
            )));
        }
        Ok(HeldOut { fraction })
    }

    /// Whether the row is held out.
    pub fn holds(&self, row: usize) -> bool {
        self.count(row + 1) > self.count(row)
    }

    /// The number of rows held out among the first `rows`: `⌊rows · fraction⌋`.
    pub fn count(&self, rows: usize) -> usize {
        (rows as f64 * self.fraction).floor() as usize
    }

    /// The share that is held out.
    pub fn fraction(&self) -> f64 {
        self.fraction
    }
}

/// A shuffle buffer over a set of activations. Original: `class Buffer`.
#[derive(Debug)]
pub struct Buffer<'a> {
    acts: &'a Activations,
    held_out: HeldOut,
    refresh: Refresh,
    batch_size: usize,
    factors: Vec<f32>,
    rng: Mt19937,
    /// The rows' bytes, slot by slot. Empty before the first fill.
    bytes: Vec<u8>,
    /// The slot of each position: shuffling moves these, not the rows.
    slots: Vec<u32>,
    /// The set's row in each slot.
    rows: Vec<u64>,
    /// The position of the next batch.
    pointer: usize,
    /// The set's row that reading goes on with.
    next_row: usize,
    /// Where the rows of the last batch lie in the set.
    last: Vec<u64>,
}

/// What a buffer needs to go on where another stood. The rows themselves are read again.
#[derive(Clone, Debug, PartialEq)]
pub struct BufferState {
    /// The set's row at each position; empty before the first fill.
    pub rows: Vec<u64>,
    /// The position of the next batch.
    pub pointer: usize,
    /// The set's row that reading goes on with.
    pub next_row: usize,
    /// The generator.
    pub rng: Mt19937,
}

/// What a cfg says of a buffer.
pub(crate) struct Sizes {
    held_out: HeldOut,
    refresh: Refresh,
    batch_size: usize,
    buffer_rows: usize,
}

impl Sizes {
    /// What [`Buffer::from_cfg`] asks of a cfg and a set, checked before anything is made.
    pub(crate) fn from_cfg(acts: &Activations, cfg: &Config) -> Result<Self> {
        let (held_out, batch_size) = (HeldOut::from_cfg(cfg)?, cfg.size("batch_size")?);
        let refresh = match cfg.get(ORIGINAL_REFRESH_KEY) {
            Some(Value::Bool(true)) => Refresh::Original,
            Some(Value::Bool(false)) | None => Refresh::ReadOn,
            Some(other) => {
                return Err(Error::config(format!("needs true or false, found {other}")).at(ORIGINAL_REFRESH_KEY));
            }
        };
        let buffer_rows = batch_size.saturating_mul(cfg.size("buffer_mult")?);
        buffer_len(acts, held_out, batch_size, buffer_rows)?;
        Ok(Sizes { held_out, refresh, batch_size, buffer_rows })
    }
}

/// The number of rows in a buffer.
fn buffer_len(acts: &Activations, held_out: HeldOut, batch_size: usize, buffer_rows: usize) -> Result<usize> {
    let train_rows = acts.rows() - held_out.count(acts.rows());
    let len = buffer_rows.min(train_rows);
    if batch_size == 0 || batch_size > len {
        return Err(Error::config(format!(
            "batch_size is {batch_size}; it must be from 1 to {len}, the rows in the buffer ({train_rows} to train on, \
             batch_size · buffer_mult = {buffer_rows})"
        )));
    }
    if u32::try_from(len).is_err() {
        return Err(Error::config(format!("a buffer of {len} rows; at most 2^32 - 1 are possible")));
    }
    Ok(len)
}

impl<'a> Buffer<'a> {
    /// The buffer that a cfg asks for by `batch_size`, `buffer_mult`, `seed` and the keys named here, with the generator as
    /// the original's `CrossCoder.__init__` leaves it.
    ///
    /// # Errors
    /// A missing or ill-typed key; as [`Self::new`].
    pub fn from_cfg(acts: &'a Activations, cfg: &Config, factors: &[f64]) -> Result<Self> {
        let Sizes { held_out, refresh, batch_size, buffer_rows } = Sizes::from_cfg(acts, cfg)?;
        let weights = cfg.dict_size()?.saturating_mul(acts.width());
        let words = match cfg.enc_dtype()? {
            Dtype::F16 => Mt19937::normal_words::<f16>(weights),
            Dtype::BF16 => Mt19937::normal_words::<bf16>(weights),
            _ => Mt19937::normal_words::<f32>(weights),
        };
        let mut rng = Mt19937::new(cfg.seed()?)?;
        rng.skip(2 * words);
        Self::new(acts, held_out, refresh, batch_size, buffer_rows, factors, rng)
    }

    /// A buffer of `buffer_rows` rows (or of as many as the set trains on, if these are fewer) that hands out batches of
    /// `batch_size`, multiplied with one factor per model. `rng` shuffles; nothing is read yet.
    ///
    /// # Errors
    /// A batch larger than the buffer, a wrong number of factors.
    pub fn new(
        acts: &'a Activations,
        held_out: HeldOut,
        refresh: Refresh,
        batch_size: usize,
        buffer_rows: usize,
        factors: &[f64],
        rng: Mt19937,
    ) -> Result<Self> {
        let len = buffer_len(acts, held_out, batch_size, buffer_rows)?;
        if factors.len() != acts.n_models() {
            let what = format!("{} normalisation factors for {} models", factors.len(), acts.n_models());
            return Err(Error::shape(what));
        }
        Ok(Buffer {
            acts,
            held_out,
            refresh,
            batch_size,
            factors: factors.iter().map(|&f| f as f32).collect(),
            rng,
            bytes: Vec::new(),
            slots: (0..len as u32).collect(),
            rows: vec![0; len],
            pointer: 0,
            next_row: 0,
            last: Vec::new(),
        })
    }

    /// The number of rows it holds.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether it holds no rows; it never does.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// The next batch, row-major [batch_size, n_models, d_in], in `out` instead of what it held. False, and no batch, if
    /// `stop` was set while rows were read; the state is then the one before the call. Original: `next`.
    ///
    /// # Errors
    /// Those of [`Activations::read`].
    pub fn next(&mut self, out: &mut Vec<f32>, stop: &AtomicBool) -> Result<bool> {
        let half_used = self.pointer > 0 && self.pointer + self.batch_size > self.len() / 2;
        if (self.bytes.is_empty() || half_used) && !self.refresh(stop)? {
            return Ok(false);
        }
        let (row_bytes, width) = (self.acts.row_bytes(), self.factors.len() * self.acts.d_in());
        let slots = &self.slots[self.pointer..self.pointer + self.batch_size];
        self.last.clear();
        self.last.extend(slots.iter().map(|&slot| self.rows[slot as usize]));
        self.pointer += self.batch_size;
        out.resize(self.batch_size * width, 0.0);
        let rows_of_thread = (THREAD_ELEMENTS / width.max(1)).max(1);
        for_rows(available().min(self.batch_size / rows_of_thread), out, width, 1, |first, out| {
            let mut row = Vec::new();
            for (out, &slot) in out.chunks_exact_mut(width).zip(&slots[first..]) {
                row.clear();
                append_f32(self.acts.dtype(), &self.bytes[slot as usize * row_bytes..][..row_bytes], &mut row);
                scale_rows(&self.factors, self.acts.d_in(), &mut row);
                out.copy_from_slice(&row);
            }
        });
        Ok(true)
    }

    /// Where the rows of the last batch lie in the set.
    pub fn last_rows(&self) -> &[u64] {
        &self.last
    }

    /// Fills all of the buffer, later the half that is used, and shuffles it. Original: `refresh`.
    fn refresh(&mut self, stop: &AtomicBool) -> Result<bool> {
        let first = self.bytes.is_empty();
        let train_rows = self.acts.rows() - self.held_out.count(self.acts.rows());
        let count = match (first, self.refresh) {
            (true, _) => self.len(),
            (false, Refresh::ReadOn) if train_rows > self.len() => self.len() / 2,
            (false, _) => 0,
        };
        if first {
            self.bytes = vec![0; self.len() * self.acts.row_bytes()];
        }
        let filled = self.fill(count, stop);
        if first && !matches!(filled, Ok(Some(_))) {
            self.bytes = Vec::new();
        }
        let Some((rows, next_row)) = filled? else { return Ok(false) };
        for (position, row) in rows.into_iter().enumerate() {
            self.rows[self.slots[position] as usize] = row;
        }
        self.next_row = next_row;
        let order = self.rng.randperm(self.len());
        self.slots = order.into_iter().map(|p| self.slots[p]).collect();
        self.pointer = 0;
        Ok(true)
    }

    /// Reads the next `count` rows to train on into positions 0, 1, …; the set's rows they are, and the row after them.
    fn fill(&mut self, count: usize, stop: &AtomicBool) -> Result<Option<(Vec<u64>, usize)>> {
        let row_bytes = self.acts.row_bytes();
        let (mut taken, mut row) = (Vec::with_capacity(count), self.next_row);
        let mut piece = Vec::new();
        while taken.len() < count {
            if stop.load(Ordering::Relaxed) {
                return Ok(None);
            }
            let n = self.acts.rows_per_piece().min(self.acts.rows() - row).min(count - taken.len());
            self.acts.read(row, n, &mut piece)?;
            for (i, bytes) in piece.chunks_exact(row_bytes).enumerate() {
                if !self.held_out.holds(row + i) {
                    let slot = self.slots[taken.len()] as usize;
                    self.bytes[slot * row_bytes..][..row_bytes].copy_from_slice(bytes);
                    taken.push((row + i) as u64);
                }
            }
            row = (row + n) % self.acts.rows();
        }
        Ok(Some((taken, row)))
    }

    /// What another buffer needs to go on from here.
    pub fn state(&self) -> BufferState {
        let rows = if self.bytes.is_empty() { Vec::new() } else { self.rows_in_order() };
        BufferState { rows, pointer: self.pointer, next_row: self.next_row, rng: self.rng.clone() }
    }

    fn rows_in_order(&self) -> Vec<u64> {
        self.slots.iter().map(|&slot| self.rows[slot as usize]).collect()
    }

    /// Goes on where `state` was taken from a buffer of the same size over the same set; reads its rows again.
    /// False, and nothing is changed, if `stop` was set meanwhile.
    ///
    /// # Errors
    /// A state of a buffer of another size or over another set; those of [`Activations::read`].
    pub fn restore(&mut self, state: BufferState, stop: &AtomicBool) -> Result<bool> {
        let rows = self.acts.rows() as u64;
        let fits = state.rows.is_empty() || state.rows.len() == self.len();
        if !fits || state.pointer > self.len() || state.next_row as u64 >= rows || state.rows.iter().any(|&r| r >= rows)
        {
            return Err(Error::format("the buffer's saved state does not fit this set and buffer size"));
        }
        // In the set's order, so that neighbours are read together.
        let row_bytes = self.acts.row_bytes();
        let mut wanted: Vec<(u64, u32)> = state.rows.iter().copied().zip(0u32..).collect();
        wanted.sort_unstable();
        let mut all = vec![0; state.rows.len() * row_bytes];
        let mut piece = Vec::new();
        let mut wanted = &wanted[..];
        while let Some(&(first, _)) = wanted.first() {
            if stop.load(Ordering::Relaxed) {
                return Ok(false);
            }
            let last = (first + self.acts.rows_per_piece() as u64).min(rows);
            let here = wanted.partition_point(|&(row, _)| row < last);
            let end = wanted[here - 1].0 + 1;
            self.acts.read(first as usize, (end - first) as usize, &mut piece)?;
            for &(row, slot) in &wanted[..here] {
                let bytes = &piece[(row - first) as usize * row_bytes..][..row_bytes];
                all[slot as usize * row_bytes..][..row_bytes].copy_from_slice(bytes);
            }
            wanted = &wanted[here..];
        }
        self.slots = (0..self.len() as u32).collect();
        self.rows = if state.rows.is_empty() { vec![0; self.len()] } else { state.rows };
        (self.bytes, self.pointer, self.next_row, self.rng) = (all, state.pointer, state.next_row, state.rng);
        Ok(true)
    }
}
