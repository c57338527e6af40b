//! Work split over threads: each piece of the output belongs to one thread, so no sum depends on how many there are.

use std::ops::Range;

/// Calls `work(first_row, rows)` on pieces of `out`, which holds `rows` rows of `row_len` elements; pieces begin at
/// multiples of `step` rows. On the calling thread alone if there is one thread or one piece.
pub(super) fn for_rows<E: Send>(
    threads: usize,
    out: &mut [E],
    row_len: usize,
    step: usize,
    work: impl Fn(usize, &mut [E]) + Sync,
) {
    let rows = out.len().checked_div(row_len).unwrap_or(0);
    let per_thread = rows.div_ceil(threads.max(1)).next_multiple_of(step.max(1));
    if rows <= per_thread {
        return work(0, out);
    }
    std::thread::scope(|scope| {
        for (i, piece) in out.chunks_mut(per_thread * row_len).enumerate() {
            let work = &work;
            scope.spawn(move || work(i * per_thread, piece));
        }
    });
}

/// `0..n` in at most `parts` ranges of nearly equal length.
pub(super) fn split(n: usize, parts: usize) -> impl Iterator<Item = Range<usize>> {
    let per_part = n.div_ceil(parts.max(1)).max(1);
    (0..n).step_by(per_part).map(move |start| start..(start + per_part).min(n))
}
