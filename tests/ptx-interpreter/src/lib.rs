//! A stand-in for NVIDIA's driver that runs PTX on the CPU, for tests on machines without a GPU.
//!
//! It has the functions that this project calls, under their names in `libcuda.so.1`, and runs a module's PTX by an
//! interpreter that checks each access to memory. Streams run late: an operation is carried out when somebody waits for
//! it, so that a missing wait shows; what is copied to the device is read from the host's memory at that time. Errors
//! of a kernel come, as from a device, with a later call, and stay.
//!
//! Functions that begin with `standin_` are for tests: they plant faults and tell what happened. Another process is told by
//! its environment: `STANDIN_DEVICE=1,12000,9,0` (devices, the driver's CUDA version, the capability) says what there is, and
//! the names of the kernels that ran go into the file `STANDIN_KERNELS` when the context ends.

#![allow(non_snake_case, unused_unsafe, clippy::missing_safety_doc)]

mod alu;
mod float;
mod hopper;
mod machine;
mod memory;
mod parse;
mod race;

use hopper::{MAGIC, TensorMap};
use machine::{Launch, run};
use memory::Memory;
use parse::Module;
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::sync::Mutex;

/// Codes of the driver.
const INVALID_VALUE: c_int = 1;
const OUT_OF_MEMORY: c_int = 2;
const INVALID_DEVICE: c_int = 101;
const INVALID_PTX: c_int = 218;
const NOT_FOUND: c_int = 500;
const ILLEGAL_ADDRESS: c_int = 700;

type Answer = Result<(), c_int>;
type Handle = *mut c_void;

#[derive(Default)]
struct Stream {
    waiting: VecDeque<Work>,
    /// Operations that were carried out, and that were ever put in.
    done: u64,
    put: u64,
    /// Whether a kernel was ever launched here.
    computes: bool,
}

/// What was asked for since somebody began to count.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub struct Counts {
    launches: u64,
    /// Copies to the device, their bytes, and how many of them are not from pinned memory or not beside the computation.
    ups: u64,
    up_bytes: u64,
    pageable_ups: u64,
    ups_in_turn: u64,
    /// Copies to the host and their bytes.
    downs: u64,
    down_bytes: u64,
    /// Times that the host waited for a stream.
    waits: u64,
}

/// An operation of a stream.
enum Work {
    Up {
        to: u64,
        from: usize,
        bytes: usize,
    },
    Down {
        to: usize,
        from: u64,
        bytes: usize,
    },
    Copy {
        to: u64,
        from: u64,
        bytes: usize,
    },
    Set {
        at: u64,
        value: u8,
        bytes: usize,
    },
    Launch {
        module: usize,
        kernel: String,
        grid: (u32, u32),
        threads: u32,
        dynamic_bytes: usize,
        params: Vec<u8>,
    },
    /// Goes on after operation `put` of another stream.
    Wait {
        stream: usize,
        put: u64,
    },
}

struct State {
    memory: Memory,
    modules: HashMap<usize, Module>,
    functions: HashMap<usize, (usize, String)>,
    /// Dynamic shared memory that a function was allowed to have.
    allowed_bytes: HashMap<usize, usize>,
    streams: HashMap<usize, Stream>,
    /// The stream and its operation that an event marks.
    events: HashMap<usize, Option<(usize, u64)>>,
    pinned: HashMap<usize, std::alloc::Layout>,
    next: usize,
    contexts: usize,
    /// The error of a kernel: every call answers with it.
    error: Option<c_int>,
    fault: CString,
    version: c_int,
    capability: (c_int, c_int),
    devices: c_int,
    /// Text to replace in the PTX of the next modules.
    plant: Option<(String, String)>,
    /// Whether copies to the device are carried out at once.
    eager_copies: bool,
    counts: Counts,
    /// The names of kernels that ran.
    kernels: BTreeSet<String>,
    /// After so many more kernels the device fails with a code.
    fail_after: Option<(u64, c_int)>,
}

static STATE: Mutex<Option<State>> = Mutex::new(None);

fn with<T>(f: impl FnOnce(&mut State) -> T) -> T {
    let mut state = STATE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let asked = || {
        let text = std::env::var("STANDIN_DEVICE").ok()?;
        let numbers: Vec<c_int> = text.split(',').filter_map(|n| n.parse().ok()).collect();
        <[c_int; 4]>::try_from(numbers).ok()
    };
    let [devices, version, major, minor] = asked().unwrap_or([1, 12_000, 8, 0]);
    f(state.get_or_insert_with(|| State {
        memory: Memory::new(),
        modules: HashMap::new(),
        functions: HashMap::new(),
        allowed_bytes: HashMap::new(),
        streams: HashMap::new(),
        events: HashMap::new(),
        pinned: HashMap::new(),
        next: 16,
        contexts: 0,
        error: None,
        fault: CString::default(),
        version,
        capability: (major, minor),
        devices,
        plant: None,
        eager_copies: false,
        counts: Counts::default(),
        kernels: BTreeSet::new(),
        fail_after: None,
    }))
}

impl State {
    fn handle(&mut self) -> usize {
        self.next += 16;
        self.next
    }

    fn fail(&mut self, code: c_int, what: &str) -> c_int {
        if self.error.is_none() {
            self.fault = CString::new(what.replace('\0', "")).unwrap_or_default();
            self.error = Some(code);
        }
        code
    }

    fn put(&mut self, stream: usize, work: Work) -> Answer {
        self.error.map_or(Ok(()), Err)?;
        let eager = self.eager_copies && matches!(work, Work::Up { .. });
        let pinned = |from: usize, bytes: usize| {
            self.pinned.iter().any(|(&at, layout)| at <= from && from + bytes <= at + layout.size())
        };
        let queue = self.streams.get_mut(&stream).ok_or(INVALID_VALUE)?;
        match work {
            Work::Up { from, bytes, .. } => {
                self.counts.ups += 1;
                self.counts.up_bytes += bytes as u64;
                self.counts.pageable_ups += u64::from(!pinned(from, bytes));
                self.counts.ups_in_turn += u64::from(queue.computes);
            }
            Work::Down { bytes, .. } => {
                self.counts.downs += 1;
                self.counts.down_bytes += bytes as u64;
            }
            Work::Launch { .. } => {
                self.counts.launches += 1;
                queue.computes = true;
            }
            _ => {}
        }
        queue.waiting.push_back(work);
        queue.put += 1;
        let put = queue.put;
        if eager { self.run_until(stream, put) } else { Ok(()) }
    }

    /// Carries out the operations of a stream up to number `until`.
    fn run_until(&mut self, stream: usize, until: u64) -> Answer {
        loop {
            self.error.map_or(Ok(()), Err)?;
            let queue = self.streams.get_mut(&stream).ok_or(INVALID_VALUE)?;
            if queue.done >= until {
                return Ok(());
            }
            let work = queue.waiting.pop_front().ok_or(INVALID_VALUE)?;
            queue.done += 1;
            self.carry_out(work)?;
        }
    }

    fn run_all(&mut self) -> Answer {
        let streams: Vec<(usize, u64)> = self.streams.iter().map(|(&s, q)| (s, q.put)).collect();
        streams.into_iter().try_for_each(|(stream, put)| self.run_until(stream, put))
    }

    fn host(&mut self, at: u64, bytes: usize) -> Result<*mut u8, c_int> {
        let found = self.memory.host(at, bytes);
        found.ok_or_else(|| self.fail(ILLEGAL_ADDRESS, &format!("a copy of {bytes} bytes at {at:#x} out of bounds")))
    }

    fn carry_out(&mut self, work: Work) -> Answer {
        match work {
            Work::Wait { stream, put } => return self.run_until(stream, put),
            Work::Up { to, from, bytes } => {
                let to = self.host(to, bytes)?;
                // SAFETY: the caller of the copy holds the host's memory; `to` holds that many bytes.
                unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to, bytes) };
            }
            Work::Down { to, from, bytes } => {
                let from = self.host(from, bytes)?;
                // SAFETY: as above.
                unsafe { std::ptr::copy_nonoverlapping(from, to as *mut u8, bytes) };
            }
            Work::Copy { to, from, bytes } => {
                let (from, to) = (self.host(from, bytes)?, self.host(to, bytes)?);
                // SAFETY: both hold that many bytes.
                unsafe { std::ptr::copy(from, to, bytes) };
            }
            Work::Set { at, value, bytes } => {
                let at = self.host(at, bytes)?;
                // SAFETY: that many bytes.
                unsafe { at.write_bytes(value, bytes) };
            }
            Work::Launch { module, kernel, grid, threads, dynamic_bytes, params } => {
                if let Some((left, code)) = &mut self.fail_after {
                    if *left == 0 {
                        let code = *code;
                        return Err(self.fail(code, "planted"));
                    }
                    *left -= 1;
                }
                self.kernels.insert(kernel.clone());
                let view = self.memory.view();
                let kernel = self.modules.get(&module).and_then(|m| m.kernels.get(&kernel)).ok_or(NOT_FOUND)?;
                let launch = Launch { kernel, grid, threads, dynamic_bytes, params: &params, memory: &view };
                if let Err(fault) = run(&launch) {
                    return Err(self.fail(ILLEGAL_ADDRESS, &fault));
                }
            }
        }
        Ok(())
    }
}

/// # Safety
/// `out` holds `bytes` bytes, at least one.
unsafe fn put_text(text: &str, out: *mut c_char, bytes: usize) {
    let text = &text.as_bytes()[..text.len().min(bytes.saturating_sub(1))];
    // SAFETY: as the caller says; one byte is left for the nul.
    unsafe {
        std::ptr::copy_nonoverlapping(text.as_ptr().cast(), out, text.len());
        *out.add(text.len()) = 0;
    }
}

fn code(answer: Answer) -> c_int {
    answer.err().unwrap_or(0)
}

/// Functions of the driver: the body gives an `Answer`.
macro_rules! driver {
    ($(fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $body:block)*) => {$(
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($arg: $ty),*) -> c_int {
            // SAFETY: the caller keeps the contract of the driver's function of this name: pointers are to what it
            // says.
            code((|| -> Answer { unsafe { $body } })())
        }
    )*};
}

driver! {
    fn cuInit(_flags: c_uint) { Ok(()) }
    fn cuDriverGetVersion(version: *mut c_int) { *version = with(|s| s.version); Ok(()) }
    fn cuDeviceGetCount(count: *mut c_int) { *count = with(|s| s.devices); Ok(()) }
    fn cuDeviceGet(device: *mut c_int, ordinal: c_int) {
        if ordinal < 0 || ordinal >= with(|s| s.devices) { return Err(INVALID_DEVICE); }
        *device = ordinal;
        Ok(())
    }
    fn cuDeviceGetName(name: *mut c_char, len: c_int, _device: c_int) {
        let text = c"PTX interpreter".to_bytes_with_nul();
        if (len as usize) < text.len() { return Err(INVALID_VALUE); }
        std::ptr::copy_nonoverlapping(text.as_ptr().cast(), name, text.len());
        Ok(())
    }
    fn cuDeviceGetAttribute(value: *mut c_int, which: c_int, _device: c_int) {
        let (major, minor) = with(|s| s.capability);
        *value = match which { 75 => major, 76 => minor, _ => return Err(INVALID_VALUE) };
        Ok(())
    }
    fn cuDevicePrimaryCtxRetain(context: *mut Handle, _device: c_int) {
        with(|s| s.contexts += 1);
        *context = 1 as Handle;
        Ok(())
    }
    fn cuDevicePrimaryCtxRelease_v2(_device: c_int) {
        with(|s| {
            s.contexts = s.contexts.saturating_sub(1);
            if s.contexts == 0 {
                // As on a device: with its last user the context goes, and with it everything in it.
                s.error = None;
                s.fail_after = None;
                if let Some(path) = std::env::var_os("STANDIN_KERNELS") {
                    let names: Vec<&str> = s.kernels.iter().map(String::as_str).collect();
                    let _ = std::fs::write(path, names.join("\n"));
                }
                s.memory.free_all();
                s.modules.clear();
                s.functions.clear();
                s.streams.clear();
                s.events.clear();
            }
        });
        Ok(())
    }
    fn cuCtxSetCurrent(_context: Handle) { Ok(()) }
    fn cuStreamCreateWithPriority(stream: *mut Handle, _flags: c_uint, _priority: c_int) {
        *stream = with(|s| { let h = s.handle(); s.streams.insert(h, Stream::default()); h }) as Handle;
        Ok(())
    }
    fn cuStreamDestroy_v2(stream: Handle) { with(|s| s.streams.remove(&(stream as usize))); Ok(()) }
    fn cuStreamSynchronize(stream: Handle) {
        with(|s| {
            s.counts.waits += 1;
            let put = s.streams.get(&(stream as usize)).ok_or(INVALID_VALUE)?.put;
            s.run_until(stream as usize, put)
        })
    }
    fn cuStreamWaitEvent(stream: Handle, event: Handle, _flags: c_uint) {
        with(|s| match *s.events.get(&(event as usize)).ok_or(INVALID_VALUE)? {
            Some((other, put)) => s.put(stream as usize, Work::Wait { stream: other, put }),
            None => Ok(()),
        })
    }
    fn cuEventCreate(event: *mut Handle, _flags: c_uint) {
        *event = with(|s| { let h = s.handle(); s.events.insert(h, None); h }) as Handle;
        Ok(())
    }
    fn cuEventDestroy_v2(event: Handle) { with(|s| s.events.remove(&(event as usize))); Ok(()) }
    fn cuEventRecord(event: Handle, stream: Handle) {
        with(|s| {
            let put = s.streams.get(&(stream as usize)).ok_or(INVALID_VALUE)?.put;
            *s.events.get_mut(&(event as usize)).ok_or(INVALID_VALUE)? = Some((stream as usize, put));
            Ok(())
        })
    }
    fn cuEventSynchronize(event: Handle) {
        with(|s| match *s.events.get(&(event as usize)).ok_or(INVALID_VALUE)? {
            Some((stream, put)) => s.run_until(stream, put),
            None => Ok(()),
        })
    }
    fn cuModuleLoadDataEx(module: *mut Handle, image: *const c_char, _n: c_uint, _options: Handle, _values: Handle) {
        let mut text = CStr::from_ptr(image).to_str().map_err(|_| INVALID_PTX)?.to_owned();
        with(|s| {
            if let Some((from, to)) = &s.plant {
                text = text.replacen(from.as_str(), to, 1);
            }
            let parsed = Module::parse(&text).map_err(|e| { s.fault = CString::new(e).unwrap_or_default(); INVALID_PTX })?;
            let h = s.handle();
            s.modules.insert(h, parsed);
            *module = h as Handle;
            Ok(())
        })
    }
    fn cuModuleUnload(module: Handle) { with(|s| s.modules.remove(&(module as usize))); Ok(()) }
    fn cuModuleGetFunction(function: *mut Handle, module: Handle, name: *const c_char) {
        let name = CStr::from_ptr(name).to_str().map_err(|_| NOT_FOUND)?.to_owned();
        with(|s| {
            let found = s.modules.get(&(module as usize)).is_some_and(|m| m.kernels.contains_key(&name));
            if !found { return Err(NOT_FOUND); }
            let h = s.handle();
            s.functions.insert(h, (module as usize, name));
            *function = h as Handle;
            Ok(())
        })
    }
    fn cuFuncSetAttribute(function: Handle, which: c_int, value: c_int) {
        with(|s| {
            // 163 KiB on devices of 8.0, 227 KiB from 9.0 on.
            let most = if s.capability.0 >= 9 { 227 << 10 } else { 163 << 10 };
            if which != 8 || value > most { return Err(INVALID_VALUE); }
            s.allowed_bytes.insert(function as usize, value as usize);
            Ok(())
        })
    }
    fn cuMemAlloc_v2(at: *mut u64, bytes: usize) {
        if bytes == 0 { return Err(INVALID_VALUE); }
        *at = with(|s| s.memory.allocate(bytes)).ok_or(OUT_OF_MEMORY)?;
        Ok(())
    }
    fn cuMemFree_v2(at: u64) {
        with(|s| { let _ = s.run_all(); if s.memory.free(at) { Ok(()) } else { Err(INVALID_VALUE) } })
    }
    fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) {
        (*free, *total) = with(|s| s.memory.available());
        Ok(())
    }
    fn cuMemAllocHost_v2(at: *mut Handle, bytes: usize) {
        let layout = std::alloc::Layout::from_size_align(bytes.max(1), 4096).map_err(|_| OUT_OF_MEMORY)?;
        let memory = std::alloc::alloc_zeroed(layout);
        if memory.is_null() { return Err(OUT_OF_MEMORY); }
        with(|s| s.pinned.insert(memory as usize, layout));
        *at = memory.cast();
        Ok(())
    }
    fn cuMemFreeHost(at: Handle) {
        let layout = with(|s| { let _ = s.run_all(); s.pinned.remove(&(at as usize)) }).ok_or(INVALID_VALUE)?;
        std::alloc::dealloc(at.cast(), layout);
        Ok(())
    }
    fn cuMemsetD8Async(at: u64, value: u8, bytes: usize, stream: Handle) {
        with(|s| s.put(stream as usize, Work::Set { at, value, bytes }))
    }
    fn cuMemcpyHtoDAsync_v2(to: u64, from: *const c_void, bytes: usize, stream: Handle) {
        with(|s| s.put(stream as usize, Work::Up { to, from: from as usize, bytes }))
    }
    fn cuMemcpyDtoHAsync_v2(to: Handle, from: u64, bytes: usize, stream: Handle) {
        with(|s| s.put(stream as usize, Work::Down { to: to as usize, from, bytes }))
    }
    fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: Handle) {
        with(|s| s.put(stream as usize, Work::Copy { to, from, bytes }))
    }
    fn cuLaunchKernel(
        function: Handle, gx: c_uint, gy: c_uint, gz: c_uint, bx: c_uint, by: c_uint, bz: c_uint, shared: c_uint,
        stream: Handle, args: *mut *mut c_void, _extra: Handle,
    ) {
        with(|s| {
            let (module, name) = s.functions.get(&(function as usize)).cloned().ok_or(INVALID_VALUE)?;
            let kernel = s.modules.get(&module).and_then(|m| m.kernels.get(&name)).ok_or(NOT_FOUND)?;
            let allowed = s.allowed_bytes.get(&(function as usize)).copied().unwrap_or(48 << 10);
            let shared = shared as usize;
            if gx == 0 || gy == 0 || gy > 65535 || (gz, by, bz) != (1, 1, 1) || !(1..=1024).contains(&bx)
                || kernel.shared_bytes + shared > allowed.max(48 << 10)
            {
                return Err(INVALID_VALUE);
            }
            let mut params = vec![0u8; kernel.params_bytes()];
            for (i, &(offset, bytes)) in kernel.params.iter().enumerate() {
                std::ptr::copy_nonoverlapping(*args.add(i) as *const u8, params[offset..].as_mut_ptr(), bytes);
            }
            let work =
                Work::Launch { module, kernel: name, grid: (gx, gy), threads: bx, dynamic_bytes: shared, params };
            s.put(stream as usize, work)
        })
    }
    fn cuTensorMapEncodeTiled(
        map: *mut u8, element: c_int, rank: c_uint, at: u64, sizes: *const u64, row_bytes: *const u64,
        boxes: *const u32, steps: *const u32, interleave: c_int, swizzle: c_int, _promotion: c_int, fill: c_int,
    ) {
        let (cols, rows, row_bytes) = (*sizes, *sizes.add(1), *row_bytes);
        let (box_cols, box_rows) = (*boxes, *boxes.add(1));
        // Two dimensions of 2-byte elements, swizzled in 128 bytes, and what the driver requires of them.
        let kind = matches!(element, 1 | 6 | 9) && rank == 2 && (interleave, swizzle, fill) == (0, 3, 0);
        let fits = box_cols == 64 && (1..=256).contains(&box_rows) && (*steps, *steps.add(1)) == (1, 1);
        let there = with(|s| s.memory.host(at, (rows * row_bytes) as usize).is_some());
        if !kind || !fits || !there || map as usize % 64 != 0 || at % 16 != 0 || row_bytes % 16 != 0 {
            return Err(INVALID_VALUE);
        }
        map.cast::<TensorMap>().write(TensorMap { magic: MAGIC, at, cols, rows, row_bytes, box_cols, box_rows });
        Ok(())
    }
    fn cuGetErrorName(_error: c_int, name: *mut *const c_char) { *name = c"an error".as_ptr(); Ok(()) }
    fn cuGetErrorString(_error: c_int, text: *mut *const c_char) { *text = c"an error".as_ptr(); Ok(()) }

    // Replaces the first `from` in the PTX of modules that are loaded from now on; null: no longer.
    fn standin_plant(from: *const c_char, to: *const c_char) {
        let text = |s: *const c_char| -> Result<String, c_int> { Ok(CStr::from_ptr(s).to_str().map_err(|_| INVALID_VALUE)?.to_owned()) };
        let plant = if from.is_null() { None } else { Some((text(from)?, text(to)?)) };
        with(|s| s.plant = plant);
        Ok(())
    }
    // What the last fault was, in words, cut to `bytes` with the final nul.
    fn standin_fault(out: *mut c_char, bytes: usize) {
        put_text(&with(|s| s.fault.to_string_lossy().into_owned()), out, bytes);
        Ok(())
    }
    // Properties of the device.
    fn standin_device(devices: c_int, version: c_int, major: c_int, minor: c_int) {
        with(|s| (s.devices, s.version, s.capability) = (devices, version, (major, minor)));
        Ok(())
    }
    fn standin_memory(limit: usize) { with(|s| s.memory.limit = limit); Ok(()) }
    fn standin_eager_copies(eager: c_int) { with(|s| s.eager_copies = eager != 0); Ok(()) }
    // Every later call fails with this code, until the context is gone; 0: no longer.
    fn standin_lose(code: c_int) {
        with(|s| if code == 0 { s.error = None } else { s.fail(code, "lost"); });
        Ok(())
    }
    // The device fails with this code after so many more kernels.
    fn standin_fail_after(kernels: u64, code: c_int) { with(|s| s.fail_after = Some((kernels, code))); Ok(()) }
    // What was asked for since the last call.
    fn standin_counts(out: *mut Counts) { *out = with(|s| std::mem::take(&mut s.counts)); Ok(()) }
    // The names of kernels that ran since the last call, a line each, cut to `bytes` with the final nul.
    fn standin_kernels(out: *mut c_char, bytes: usize) {
        let ran = with(|s| std::mem::take(&mut s.kernels));
        put_text(&ran.into_iter().collect::<Vec<_>>().join("\n"), out, bytes);
        Ok(())
    }
}
