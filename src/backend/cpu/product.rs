//! Dense products by tiles: one side is packed whole, the other is streamed through in blocks that fit the second-level
//! cache; a block's result is handed on while it is there.

use super::buffers::{Buffer, Buffers, Scratch};
use super::kernels::{self, Level, Side};
use crate::backend::Scalar;
use crate::threads::{for_each, pieces};
use std::ops::Range;

/// Rows of the streamed side that are multiplied at a time: 256 rows of a segment are 0.3 to 0.5 MiB.
pub(super) const BLOCK_ROWS: usize = 256;

/// Terms of a segment where nothing else fixes it.
pub(super) const SEGMENT: usize = 256;

/// The segment of products of pairs of bfloat16.
pub(super) const PAIR_SEGMENT: usize = 512;

/// What products need beside their operands.
#[derive(Clone, Debug)]
pub(super) struct Workshop<T> {
    pub(super) level: Level,
    pub(super) full: Buffers<T>,
    pub(super) pairs: Buffers<u32>,
    pub(super) masks: Buffers<u64>,
    /// For rows that are unpacked.
    pub(super) scratch: Scratch<T>,
}

impl<T> Default for Workshop<T> {
    fn default() -> Self {
        Workshop {
            level: Level::best(),
            full: Buffers::default(),
            pairs: Buffers::default(),
            masks: Buffers::default(),
            scratch: Scratch::default(),
        }
    }
}

/// Which side of a product is packed whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Resident {
    Left,
    Right,
}

enum Panels<T> {
    Full(Buffer<T>),
    Pairs(Buffer<u32>),
}

/// A side of a product, packed whole.
pub(super) struct Packed<T> {
    panels: Panels<T>,
    which: Resident,
    rows: usize,
    /// Panels are filled up to whole ones.
    padded_rows: usize,
    terms: Range<usize>,
    segment: usize,
}

/// Rows in a panel of the left and the right side.
fn tile<T: Scalar>(level: Level, pairs: bool) -> (usize, usize) {
    if pairs { kernels::PAIR_TILE } else { level.tile::<T>() }
}

impl<T: Scalar> Workshop<T> {
    /// Packs a side; terms are added in segments of `segment`. In pairs of bfloat16 if `pairs`.
    pub(super) fn pack(
        &self,
        threads: usize,
        side: &Side<'_, T>,
        which: Resident,
        terms: Range<usize>,
        segment: usize,
        pairs: bool,
    ) -> Packed<T> {
        let (left, right) = tile::<T>(self.level, pairs);
        let width = if which == Resident::Left { left } else { right };
        let padded_rows = side.rows.next_multiple_of(width);
        let segments = pieces(terms.clone(), segment);
        let panels = if pairs {
            assert!(segment.is_multiple_of(2), "pairs do not cross segments");
            let mut out = self.pairs.take(padded_rows * terms.len().div_ceil(2));
            let chunks = out.chunks_mut((padded_rows * segment / 2).max(1));
            for_each(
                threads,
                segments.zip(chunks),
                || (),
                |_, (segment, out)| {
                    kernels::pack_pairs(self.level, side, 0..side.rows, segment, width, out);
                },
            );
            Panels::Pairs(out)
        } else {
            let mut out = self.full.take(padded_rows * terms.len());
            let chunks = out.chunks_mut((padded_rows * segment).max(1));
            for_each(
                threads,
                segments.zip(chunks),
                || (),
                |_, (segment, out)| {
                    kernels::pack(self.level, side, 0..side.rows, segment, width, out);
                },
            );
            Panels::Full(out)
        };
        Packed { panels, which, rows: side.rows, padded_rows, terms, segment }
    }

    /// Rows of the streamed side to take at a time, so that all threads have enough to do.
    pub(super) fn block_rows(&self, threads: usize, rows: usize) -> usize {
        rows.div_ceil(4 * threads).next_multiple_of(32).min(BLOCK_ROWS)
    }
}

impl<T: Scalar> Packed<T> {
    /// The product of this side with the rows `rows` of the other one, into `out`: as many rows as the left side has here,
    /// as many columns as the right side.
    pub(super) fn times(&self, shop: &Workshop<T>, other: &Side<'_, T>, rows: Range<usize>, out: &mut [T]) {
        let pairs = matches!(self.panels, Panels::Pairs(_));
        let (left, right) = tile::<T>(shop.level, pairs);
        let width = if self.which == Resident::Left { right } else { left };
        let (m, n) = match self.which {
            Resident::Left => (self.rows, rows.len()),
            Resident::Right => (rows.len(), self.rows),
        };
        assert_eq!(out.len(), m * n);
        out.fill(T::zero());
        let longest = rows.len().next_multiple_of(width) * self.segment.min(self.terms.len().next_multiple_of(2));
        let (mut full, mut packed) = (
            shop.full.take(if pairs { 0 } else { longest }),
            shop.pairs.take(if pairs { longest.div_ceil(2) } else { 0 }),
        );
        for terms in pieces(self.terms.clone(), self.segment) {
            let from = terms.start - self.terms.start;
            match &self.panels {
                Panels::Full(panels) => {
                    let other_panels = &mut full[..kernels::packed_len(width, rows.len(), terms.len())];
                    kernels::pack(shop.level, other, rows.clone(), terms.clone(), width, other_panels);
                    let mine = &panels[from * self.padded_rows..][..terms.len() * self.padded_rows];
                    let (left, right) =
                        if self.which == Resident::Left { (mine, &*other_panels) } else { (&*other_panels, mine) };
                    kernels::multiply(shop.level, terms.len(), left, right, out, m, n, n);
                }
                Panels::Pairs(panels) => {
                    let count = terms.len().div_ceil(2);
                    let other_panels = &mut packed[..kernels::packed_len(width, rows.len(), count)];
                    kernels::pack_pairs(shop.level, other, rows.clone(), terms.clone(), width, other_panels);
                    let mine = &panels[from / 2 * self.padded_rows..][..count * self.padded_rows];
                    let (left, right) =
                        if self.which == Resident::Left { (mine, &*other_panels) } else { (&*other_panels, mine) };
                    kernels::multiply_pairs(shop.level, count, left, right, out, m, n, n);
                }
            }
        }
    }
}
