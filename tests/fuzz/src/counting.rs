//! An allocator that counts what the calling thread holds, so that a target can say how much a reader may allocate.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

thread_local! {
    static HELD: Cell<usize> = const { Cell::new(0) };
    static PEAK: Cell<usize> = const { Cell::new(0) };
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

/// `added` bytes are held from now on, in one piece.
fn count(added: usize) {
    let held = HELD.get().wrapping_add(added);
    HELD.set(held);
    // What another thread allocated and this one frees makes the number wrap; it is not looked at then.
    if held < usize::MAX / 2 {
        PEAK.set(PEAK.get().max(held));
    }
    LARGEST.set(LARGEST.get().max(added));
}

// SAFETY: everything is passed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller's promise, passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // While it moves, both are there.
        count(size);
        HELD.set(HELD.get().wrapping_sub(layout.size()));
        // SAFETY: as above.
        unsafe { System.realloc(at, layout, size) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        HELD.set(HELD.get().wrapping_sub(layout.size()));
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }
}

/// What a call allocated: the most that it held at once, and its largest piece.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Used {
    pub(crate) peak: usize,
    pub(crate) largest: usize,
}

/// Runs `f` and says what it allocated on this thread.
pub(crate) fn measure<T>(f: impl FnOnce() -> T) -> (T, Used) {
    let before = HELD.get();
    PEAK.set(before);
    LARGEST.set(0);
    let result = f();
    (result, Used { peak: PEAK.get().wrapping_sub(before), largest: LARGEST.get() })
}
