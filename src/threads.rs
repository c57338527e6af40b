//! Work split over threads: each piece of the output belongs to one thread, so no sum depends on how many there are.

use std::ops::Range;
use std::sync::Mutex;

/// The number of threads that this process can run at a time.
pub(crate) fn available() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// What `f` gives, and what `other` does, which runs beside it on a thread of its own; after it if none can be started.
pub(crate) fn beside<T, U: Send>(f: impl FnOnce() -> T, other: impl FnOnce() -> U + Send) -> (T, U) {
    let (mut other, mut theirs) = (Some(other), None);
    let ours = std::thread::scope(|scope| {
        let (other, theirs) = (&mut other, &mut theirs);
        let _ = std::thread::Builder::new().spawn_scoped(scope, move || *theirs = other.take().map(|other| other()));
        f()
    });
    (ours, theirs.unwrap_or_else(|| other.take().expect("what did not run there is still here")()))
}

/// Calls `work(first_row, rows)` on pieces of `out`, which holds rows of `row_len` elements; pieces begin at multiples of
/// `step` rows. On the calling thread alone if there is one thread or one piece.
pub(crate) fn for_rows<E: Send>(
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
    let pieces = out.chunks_mut(per_thread * row_len).enumerate();
    for_each(threads, pieces, || (), |_, (i, piece)| work(i * per_thread, piece));
}

/// Calls `work` on each item; a thread that is done with one takes the next. Each thread makes itself a state first. The
/// calling thread is one of the threads.
pub(crate) fn for_each<I: Send, S>(
    threads: usize,
    items: impl Iterator<Item = I> + Send,
    state: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, I) + Sync,
) {
    if threads <= 1 {
        let mut state = state();
        return items.for_each(|item| work(&mut state, item));
    }
    let items = Mutex::new(items);
    let next = || items.lock().expect("an iterator that does not panic").next();
    let run = || {
        let mut state = state();
        while let Some(item) = next() {
            work(&mut state, item);
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads {
            // A thread that cannot be started leaves its work to the others.
            let _ = std::thread::Builder::new().spawn_scoped(scope, run);
        }
        run();
    });
}

/// `range` in pieces of `step`.
pub(crate) fn pieces(range: Range<usize>, step: usize) -> impl Iterator<Item = Range<usize>> + Send + Clone {
    range.clone().step_by(step.max(1)).map(move |start| start..(start + step.max(1)).min(range.end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_sides_are_run_once_and_may_borrow() {
        let (mut ours, mut theirs) = (0, 0);
        let add = |n: &mut i32| {
            *n += 1;
            *n
        };
        assert_eq!(beside(|| add(&mut ours), || add(&mut theirs)), (1, 1));
        assert_eq!((ours, theirs), (1, 1));
    }
}
