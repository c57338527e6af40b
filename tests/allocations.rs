//! A training step allocates next to nothing after the first ones: no weight, no batch, no latents.
#![allow(unsafe_code)]

use crosscoder::backend::Cpu;
use crosscoder::sparse::Path;
use crosscoder::trainer::Trainer;
use crosscoder::{Config, CrossCoder, Dtype};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// The system's allocator, which counts.
struct Counting;

static BYTES: AtomicUsize = AtomicUsize::new(0);
static LARGEST: AtomicUsize = AtomicUsize::new(0);

fn count(bytes: usize) {
    BYTES.fetch_add(bytes, Relaxed);
    LARGEST.fetch_max(bytes, Relaxed);
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
        count(size);
        // SAFETY: as above.
        unsafe { System.realloc(at, layout, size) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn a_step_allocates_next_to_nothing_after_the_first() {
    let (d_in, dict_size, batch) = (128, 2048, 256);
    let x: Vec<f32> = (0..batch * 2 * d_in).map(|i| ((i * 7919) % 1009) as f32 / 504.5 - 1.0).collect();
    // Half of the latents are on.
    for (dtype, path) in [
        (Dtype::F32, Path::Sparse),
        (Dtype::F32, Path::Dense),
        (Dtype::F32, Path::Auto),
        (Dtype::BF16, Path::Sparse),
        (Dtype::BF16, Path::Dense),
        (Dtype::BF16, Path::Auto),
    ] {
        let mut cfg = Config::default();
        cfg.set("d_in", d_in);
        cfg.set("dict_size", dict_size);
        cfg.set("batch_size", batch);
        cfg.set("num_tokens", 1000 * batch);
        cfg.set("lr", 1e-9);
        cfg.set("enc_dtype", dtype.enc_name().unwrap());
        let backend = Cpu::<f32>::new(dtype).with_path(path).with_threads(2);
        let mut trainer = Trainer::new(CrossCoder::new_on(backend, cfg).unwrap()).unwrap();
        for _ in 0..5 {
            trainer.step(&x).unwrap();
        }
        assert!(LARGEST.load(Relaxed) >= 2 << 20, "a weight was counted");
        BYTES.store(0, Relaxed);
        LARGEST.store(0, Relaxed);
        let steps = 5;
        for _ in 0..steps {
            trainer.step(&x).unwrap();
        }
        let (bytes, largest) = (BYTES.load(Relaxed) / steps, LARGEST.load(Relaxed));
        println!("{dtype} {path:?}: {bytes} bytes a step, the largest of {largest}");
        // A batch has 256 KiB, a weight 2 MiB, dense latents 2 MiB. What remains are some numbers for each row, threads,
        // and a thread's scratch that grows when the scheduler gives it more of the support than it met before (seen: 32 KiB).
        assert!(bytes < 64 << 10 && largest <= 64 << 10, "{dtype} {path:?}: {bytes} bytes a step, largest {largest}");
    }
}
