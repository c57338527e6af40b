//! What only Hopper has: barriers with phases, the copy engine, products of four warps.

use crate::alu::Lanes;
use crate::float::{bf16_to_f32, f16_to_f32, truncate};
use crate::memory::View;
use crate::race::{Shared, Who};

/// A barrier in shared memory. A phase ends when `pending` arrivals and `bytes` bytes are not missing any more.
#[derive(Default)]
pub(crate) struct Mbarrier {
    arrivals: u64,
    pending: u64,
    bytes: i64,
    phase: u64,
    /// What those who arrive have done, and what those who have waited come after.
    released: Vec<u32>,
    over: Vec<u32>,
}

impl Mbarrier {
    pub(crate) fn new(arrivals: u64) -> Self {
        Mbarrier { arrivals, pending: arrivals, ..Default::default() }
    }

    fn settle(&mut self) {
        if self.pending == 0 && self.bytes == 0 {
            self.phase += 1;
            self.pending = self.arrivals;
            self.over.clone_from(&self.released);
        }
    }

    pub(crate) fn arrive(&mut self, shared: &mut Shared, agent: usize, expect: u64) -> Result<(), String> {
        self.pending = self.pending.checked_sub(1).ok_or("more arrivals than the barrier awaits")?;
        self.bytes += expect as i64;
        shared.release(agent, &mut self.released);
        self.settle();
        Ok(())
    }

    /// Bytes have come, brought by the copy engine.
    pub(crate) fn complete(&mut self, shared: &mut Shared, bytes: usize) {
        self.bytes -= bytes as i64;
        shared.release(shared.copy_engine(), &mut self.released);
        self.settle();
    }

    /// Whether the phase of this parity has ended; then `agent` comes after it.
    pub(crate) fn try_wait(&self, shared: &mut Shared, agent: usize, parity: u64) -> bool {
        let over = self.phase & 1 != parity & 1;
        if over {
            shared.acquire(agent, &self.over);
        }
        over
    }
}

/// What the stand-in's `cuTensorMapEncodeTiled` writes: an array [rows, cols] of 2-byte elements, and the box that is
/// copied.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct TensorMap {
    pub(crate) magic: u64,
    pub(crate) at: u64,
    pub(crate) cols: u64,
    pub(crate) rows: u64,
    pub(crate) row_bytes: u64,
    pub(crate) box_cols: u32,
    pub(crate) box_rows: u32,
}

pub(crate) const MAGIC: u64 = 0x70_74_78_5f_6d_61_70_21;

impl TensorMap {
    pub(crate) fn from_bytes(bytes: &[u8]) -> Result<Self, String> {
        let bytes = bytes.get(..size_of::<Self>()).ok_or("no tensor map there")?;
        // SAFETY: as many bytes as the type has, any of which are a value of it.
        let map = unsafe { bytes.as_ptr().cast::<Self>().read_unaligned() };
        if map.magic == MAGIC { Ok(map) } else { Err("these bytes are no tensor map".into()) }
    }
}

/// Chunks of 16 bytes in rows of 128 are permuted by the row's number modulo 8: bits 4 to 6 of the address by bits 7 to
/// 9.
fn swizzled(at: u64) -> u64 {
    at ^ (at >> 7 & 7) << 4
}

/// Copies the box that begins at [y, x]; what lies outside of the array is 0. The number of bytes.
pub(crate) fn copy_box(
    shared: &mut Shared,
    memory: &View,
    who: Who,
    map: &TensorMap,
    (x, y): (u64, u64),
    to: u64,
) -> Result<usize, String> {
    if to % 1024 != 0 {
        return Err(format!("a box that is swizzled in 128 bytes needs 1024-byte alignment, not {to}"));
    }
    let mut last = 0;
    for row in 0..u64::from(map.box_rows) {
        for chunk in 0..u64::from(map.box_cols) / 8 {
            let mut data = [0u8; 16];
            let (r, c) = (y + row, x + chunk * 8);
            if r < map.rows && c < map.cols {
                let count = (map.cols - c).min(8) as usize * 2;
                let from = map.at + r * map.row_bytes + c * 2;
                let found = memory.host(from, count, &mut last);
                let from = found.ok_or_else(|| format!("global memory out of bounds: {count} bytes at {from:#x}"))?;
                // SAFETY: that many bytes of an allocation.
                unsafe { std::ptr::copy_nonoverlapping(from, data.as_mut_ptr(), count) };
            }
            shared.write_by_engine(who, to + swizzled(row * 128 + chunk * 16), &data)?;
        }
    }
    Ok(map.box_rows as usize * map.box_cols as usize * 2)
}

/// An operand of wgmma in shared memory, 16 k of it: lines of 128 bytes, groups of 8 lines `stride` bytes apart, swizzled.
/// K-minor: a line holds the k of a row. Otherwise it holds 64 rows for one k, and the next 64 are `leading` bytes further on.
#[derive(Clone, Copy)]
pub(crate) struct Descriptor {
    at: u64,
    leading: u64,
    stride: u64,
    k_minor: bool,
}

impl Descriptor {
    pub(crate) fn new(bits: u64, k_minor: bool) -> Result<Self, String> {
        if bits >> 62 != 1 || bits >> 49 & 7 != 0 {
            return Err(format!("descriptor {bits:#x}: only swizzling in 128 bytes, without an offset"));
        }
        let bytes = |from: u32| (bits >> from & 0x3fff) << 4;
        Ok(Descriptor { at: bytes(0), leading: bytes(16), stride: bytes(32), k_minor })
    }

    /// Where an element lies.
    fn at(self, row: u64, k: u64) -> u64 {
        match self.k_minor {
            true => swizzled(self.at + row / 8 * self.stride + row % 8 * 128 + k / 8 * 16) + k % 8 * 2,
            false => {
                let line = self.at + row / 64 * self.leading + k / 8 * self.stride + k % 8 * 128;
                swizzled(line + row % 64 / 8 * 16) + row % 8 * 2
            }
        }
    }

    /// The chunks of 16 bytes that hold 16 k of these rows, whose number is a multiple of 8.
    pub(crate) fn chunks(self, rows: std::ops::Range<u64>) -> Vec<u64> {
        let (row_step, k_step) = if self.k_minor { (1, 8) } else { (8, 1) };
        let of_row = |row| (0..16).step_by(k_step).map(move |k| self.at(row, k));
        rows.step_by(row_step).flat_map(of_row).collect()
    }

    fn row(self, shared: &mut Shared, who: Who, row: u64, bf16: bool) -> Result<[f64; 16], String> {
        let mut out = [0.0; 16];
        let together = if self.k_minor { 8 } else { 1 };
        for (i, values) in out.chunks_exact_mut(together).enumerate() {
            let data = shared.read_in_flight(who, self.at(row, (i * together) as u64), together * 2)?;
            for (v, pair) in values.iter_mut().zip(data.chunks_exact(2)) {
                let bits = u16::from_le_bytes([pair[0], pair[1]]);
                *v = f64::from(if bf16 { bf16_to_f32(bits) } else { f16_to_f32(bits) });
            }
        }
        Ok(out)
    }
}

/// This warp's 16 rows of d [64, n] = a [64, 16] · b [n, 16]ᵀ, added to `d` if `keep`. `d[j]` is register j of each
/// lane.
pub(crate) fn wgmma(
    shared: &mut Shared,
    warp: usize,
    [a, b]: [Descriptor; 2],
    n: usize,
    bf16: bool,
    keep: bool,
    d: &mut [Lanes],
) -> Result<(), String> {
    let who = Who { agent: warp, lane: 0 };
    let first = warp as u64 % 4 * 16;
    let rows = (0..16).map(|i| a.row(shared, who, first + i, bf16)).collect::<Result<Vec<_>, _>>()?;
    let cols = (0..n as u64).map(|i| b.row(shared, who, i, bf16)).collect::<Result<Vec<_>, _>>()?;
    for (j, register) in d.iter_mut().enumerate() {
        for (lane, v) in register.iter_mut().enumerate() {
            let (m, n) = (lane / 4 + j / 2 % 2 * 8, j / 4 * 8 + lane % 4 * 2 + j % 2);
            let before = if keep { f64::from(f32::from_bits(*v as u32)) } else { 0.0 };
            let sum: f64 = rows[m].iter().zip(&cols[n]).map(|(x, y)| x * y).sum();
            *v = u64::from(truncate(before + sum).to_bits());
        }
    }
    Ok(())
}
