//! cust, the driver, and all `unsafe` of the GPU backend: a device, its memory, its kernels.
//!
//! One stream computes; a second one brings activations up from pinned memory, beside it. Memory that is given back is
//! kept and used again: the compute stream runs in order, so whoever gets it next comes after whoever had it before.
//! Copies on the other stream have memory of their own.
//!
//! **What is safe.** A launch checks that kernel and arguments agree in number and size. That kernels stay within the
//! buffers they are given is their contract, which the tests check by running them in an interpreter that checks every
//! access. A kernel that breaks it harms memory of the device, not of the host: the driver reports an illegal access,
//! and every later call fails.

#![allow(unsafe_code)]

mod forward;

use crate::error::{Error, ErrorKind, Result};
use crate::threads;
use cust::context::{Context, CurrentContext};
use cust::device::{Device, DeviceAttribute};
use cust::error::CudaError;
use cust::module::Module;
use cust::stream::{Stream, StreamFlags};
use cust::sys::{self, CUdeviceptr, CUevent, CUfunction, CUresult};
use cust::{CudaApiVersion, CudaFlags};
use half::{bf16, f16};
use std::collections::{BTreeMap, HashMap};
use std::ffi::{CStr, c_void};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A type whose values are their bytes, on the host as on the device.
///
/// # Safety
/// No padding, and any bytes are a value.
pub(super) unsafe trait Plain: Copy + Default {}

// SAFETY: numbers, or transparent over one.
unsafe impl Plain for u32 {}
unsafe impl Plain for f32 {}
unsafe impl Plain for f16 {}
unsafe impl Plain for bf16 {}

/// PTX and what it needs.
pub(super) struct Source {
    pub(super) name: &'static str,
    pub(super) ptx: &'static str,
    /// Compute capability, major and minor.
    pub(super) capability: (i32, i32),
    /// Whether it runs on that major version alone.
    pub(super) exact: bool,
    /// The oldest CUDA version whose driver reads this PTX.
    pub(super) cuda: (i32, i32),
    /// Functions of the driver that its kernels need beside those that cust knows.
    pub(super) functions: &'static [&'static CStr],
}

/// The function behind [`Gpu::tensor_map`]. It came with CUDA 12.0, and cust does not know it.
pub(super) const TENSOR_MAP: &CStr = c"cuTensorMapEncodeTiled";

/// A GPU that is ready to compute. Clones are the same GPU.
#[derive(Clone)]
pub(super) struct Gpu(Arc<Inner>);

struct Inner {
    name: String,
    capability: (i32, i32),
    kernels: HashMap<String, Kernel>,
    pool: Mutex<Pool>,
    uploads: Mutex<Uploads>,
    compute: Stream,
    copies: Stream,
    /// Kept for their functions.
    _modules: Vec<Module>,
    context: Context,
}

// SAFETY: handles of the driver, which any thread may use once the context is current there; see `Inner::enter`.
unsafe impl Send for Inner {}
unsafe impl Sync for Inner {}

struct Kernel {
    function: CUfunction,
    /// The size of each parameter, read from the PTX.
    params_bytes: Vec<usize>,
}

/// Memory that nobody holds, by size.
#[derive(Default)]
struct Pool {
    free: BTreeMap<usize, Vec<CUdeviceptr>>,
    count: usize,
}

/// Memory on the device. Given back when dropped.
pub(super) struct Buffer {
    gpu: Gpu,
    at: CUdeviceptr,
    bytes: usize,
}

/// An argument of a kernel: its bytes, which come first and so lie at 64 bytes, as a tensor map must.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Arg {
    bytes: [u8; 128],
    size: usize,
}

impl Arg {
    /// A pointer that is null.
    pub(super) const NULL: Arg = Arg { bytes: [0; 128], size: 8 };

    fn new<const N: usize>(value: [u8; N]) -> Self {
        let mut bytes = [0; 128];
        bytes[..N].copy_from_slice(&value);
        Arg { bytes, size: N }
    }
}

impl From<&Buffer> for Arg {
    fn from(buffer: &Buffer) -> Self {
        buffer.at.into()
    }
}

impl From<Option<&Buffer>> for Arg {
    fn from(buffer: Option<&Buffer>) -> Self {
        buffer.map_or(Arg::NULL, Arg::from)
    }
}

impl From<u64> for Arg {
    fn from(v: u64) -> Self {
        Arg::new(v.to_ne_bytes())
    }
}

impl From<u32> for Arg {
    fn from(v: u32) -> Self {
        Arg::new(v.to_ne_bytes())
    }
}

impl From<bool> for Arg {
    fn from(v: bool) -> Self {
        u32::from(v).into()
    }
}

impl From<f32> for Arg {
    fn from(v: f32) -> Self {
        Arg::new(v.to_ne_bytes())
    }
}

/// Blocks in x and y, threads of a block, bytes of dynamic shared memory.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub(super) grid: (usize, usize),
    pub(super) threads: u32,
    pub(super) shared_bytes: u32,
}

fn device_error(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Device, what)
}

/// The error of a call that was `doing` something when the driver answered with this code.
fn refused(doing: &str, code: u32, name: &dyn std::fmt::Debug) -> Error {
    let remedy = match code {
        2 => "; a smaller batch or dictionary needs less memory",
        700 | 714..=719 => "; the device cannot be used again in this process",
        999 => "; the device or its driver may be lost",
        _ => "",
    };
    device_error(format!("{doing}: the driver answered {name:?} ({code}){remedy}"))
}

fn failed(doing: &str, error: CudaError) -> Error {
    refused(doing, error as u32, &error)
}

fn check(doing: &str, result: CUresult) -> Result<()> {
    if result == CUresult::CUDA_SUCCESS { Ok(()) } else { Err(refused(doing, result as u32, &result)) }
}

impl Gpu {
    /// Device `ordinal` with those of `sources` that run on it. Those that are for all later devices are needed.
    ///
    /// # Errors
    /// No driver, a driver that is too old, no such device, a device that is too old, or whatever the driver reports.
    pub(super) fn open(ordinal: u32, sources: &[Source]) -> Result<Self> {
        if !forward::present() {
            return Err(device_error("no NVIDIA driver"));
        }
        match cust::init(CudaFlags::empty()) {
            Err(CudaError::NoDevice) => return Err(device_error("no device")),
            other => other.map_err(|e| failed("starting the driver", e))?,
        }
        let devices = Device::num_devices().map_err(|e| failed("counting devices", e))?;
        if devices == 0 {
            return Err(device_error("no device"));
        }
        if ordinal >= devices {
            return Err(device_error(format!("no device {ordinal}; there are {devices}, counted from 0")));
        }
        let asked = "asking for the device's properties";
        let version = CudaApiVersion::get().map_err(|e| failed(asked, e))?;
        let version = (version.major(), version.minor());
        let device = Device::get_device(ordinal).map_err(|e| failed(asked, e))?;
        let name = device.name().map_err(|e| failed(asked, e))?;
        let attribute = |which| device.get_attribute(which).map_err(|e| failed(asked, e));
        let capability =
            (attribute(DeviceAttribute::ComputeCapabilityMajor)?, attribute(DeviceAttribute::ComputeCapabilityMinor)?);
        let context = Context::new(device).map_err(|e| failed("making a context", e))?;
        let has = |function: &CStr| forward::symbol(function).is_some();
        let mut wanted = Vec::new();
        for source in sources {
            let fits = if source.exact { capability.0 == source.capability.0 } else { capability >= source.capability };
            if source.exact && !(fits && version >= source.cuda && source.functions.iter().all(|f| has(f))) {
                continue;
            }
            if !fits {
                let (major, minor) = source.capability;
                let (has, has_minor) = capability;
                return Err(device_error(format!(
                    "{name} has compute capability {has}.{has_minor}; the kernels need {major}.{minor}"
                )));
            }
            if version < source.cuda {
                let ((major, minor), (has, has_minor)) = (source.cuda, version);
                return Err(device_error(format!(
                    "driver too old for this module: {} needs a driver of CUDA {major}.{minor}, this one is of \
                     {has}.{has_minor}",
                    source.name
                )));
            }
            wanted.push((source, None));
        }
        // The driver compiles each, seconds long, unless it finds it in its cache.
        threads::for_each(
            wanted.len(),
            wanted.iter_mut(),
            || (),
            |_, (source, module)| {
                let loaded = CurrentContext::set_current(&context).and_then(|()| Module::from_ptx(source.ptx, &[]));
                *module = Some(loaded.map_err(|e| failed(&format!("loading the module {}", source.name), e)));
            },
        );
        let (mut modules, mut kernels) = (Vec::new(), HashMap::new());
        for (source, module) in wanted {
            let module = module.expect("each was taken by a thread")?;
            for (kernel, params_bytes) in parse_entries(source.ptx) {
                let function = module.get_function(&kernel).map_err(|e| failed(&format!("finding {kernel}"), e))?;
                kernels.insert(kernel, Kernel { function: function.to_raw(), params_bytes });
            }
            modules.push(module);
        }
        let stream = || Stream::new(StreamFlags::DEFAULT, None).map_err(|e| failed("making a stream", e));
        let (compute, copies) = (stream()?, stream()?);
        let uploads = Mutex::new(Uploads { slots: [Slot::new()?, Slot::new()?], next: 0 });
        Ok(Gpu(Arc::new(Inner {
            name,
            capability,
            kernels,
            pool: Mutex::default(),
            uploads,
            compute,
            copies,
            _modules: modules,
            context,
        })))
    }

    /// The device's name, as the driver gives it.
    pub(super) fn name(&self) -> &str {
        &self.0.name
    }

    /// Compute capability, major and minor.
    pub(super) fn capability(&self) -> (i32, i32) {
        self.0.capability
    }

    /// `bytes` of memory, at least one, contents unspecified.
    pub(super) fn buffer(&self, bytes: usize) -> Result<Buffer> {
        let size = pooled_bytes(bytes.max(1));
        let found = lock(&self.0.pool).take(size);
        let at = match found {
            Some(at) => at,
            None => self.0.allocate(size)?,
        };
        Ok(Buffer { gpu: self.clone(), at, bytes: size })
    }

    /// Whether a module that has this kernel was loaded.
    pub(super) fn has(&self, kernel: &str) -> bool {
        self.0.kernels.contains_key(kernel)
    }

    /// A tensor map of `matrix`, a pointer to [rows, cols] elements of 2 bytes, for the copy engine: boxes of
    /// `box_rows` rows and 64 columns, swizzled in 128 bytes, zeros beyond the ends. `cols` is a multiple of 8.
    pub(super) fn tensor_map(&self, matrix: Arg, rows: usize, cols: usize, box_rows: u32) -> Result<Arg> {
        // Map, element type, rank, address, sizes, strides in bytes, box, steps, interleaving, swizzling, promotion to L2,
        // fill.
        type Encode = unsafe extern "C" fn(
            *mut u8,
            i32,
            u32,
            CUdeviceptr,
            *const u64,
            *const u64,
            *const u32,
            *const u32,
            i32,
            i32,
            i32,
            i32,
        ) -> i32;
        const UINT16: i32 = 1;
        const SWIZZLE_128_BYTES: i32 = 3;
        const PROMOTE_256_BYTES: i32 = 3;
        let doing = "describing a matrix to the copy engine";
        let Some(function) = forward::symbol(TENSOR_MAP) else {
            return Err(device_error(format!("{doing}: the driver has no cuTensorMapEncodeTiled")));
        };
        let at = u64::from_ne_bytes(*matrix.bytes.first_chunk().expect("a pointer has 8 bytes"));
        let (sizes, row_bytes) = ([cols as u64, rows as u64], [cols as u64 * 2]);
        let (shape, steps) = ([64, box_rows], [1, 1]);
        let mut map = Arg { bytes: [0; 128], size: 128 };
        self.0.enter()?;
        // SAFETY: the driver's function of this name has this signature (cuda.h), writes 128 bytes, aligned to 64, and
        // reads two numbers from each array, one from the strides.
        let result = unsafe {
            let encode = std::mem::transmute::<*mut c_void, Encode>(function);
            encode(
                map.bytes.as_mut_ptr(),
                UINT16,
                2,
                at,
                sizes.as_ptr(),
                row_bytes.as_ptr(),
                shape.as_ptr(),
                steps.as_ptr(),
                0,
                SWIZZLE_128_BYTES,
                PROMOTE_256_BYTES,
                0,
            )
        };
        check(doing, forward::result(result))?;
        Ok(map)
    }

    /// Sets all bytes to 0.
    pub(super) fn zero(&self, buffer: &Buffer) -> Result<()> {
        self.0.enter()?;
        // SAFETY: the buffer holds that many bytes.
        let result = unsafe { sys::cuMemsetD8Async(buffer.at, 0, buffer.bytes, self.0.compute.as_inner()) };
        check("clearing memory on the device", result)
    }

    /// Copies `values` to the start of `buffer`.
    ///
    /// # Panics
    /// If they do not fit.
    pub(super) fn write<T: Plain>(&self, buffer: &Buffer, values: &[T]) -> Result<()> {
        let bytes = size_of_val(values);
        assert!(bytes <= buffer.bytes, "{bytes} bytes for a buffer of {}", buffer.bytes);
        self.0.enter()?;
        let stream = self.0.compute.as_inner();
        // SAFETY: both sides hold that many bytes, and the values outlive the copy, which is waited for.
        let result = unsafe { sys::cuMemcpyHtoDAsync_v2(buffer.at, values.as_ptr().cast(), bytes, stream) };
        check("copying to the device", result)?;
        self.wait()
    }

    /// Copies elements from `buffer`, from element `at` on, into `out`.
    ///
    /// # Panics
    /// If the buffer ends before.
    pub(super) fn read<T: Plain>(&self, buffer: &Buffer, at: usize, out: &mut [T]) -> Result<()> {
        let (at, bytes) = (at * size_of::<T>(), size_of_val(out));
        assert!(at + bytes <= buffer.bytes, "bytes {at}..{} of a buffer of {}", at + bytes, buffer.bytes);
        if bytes == 0 {
            return Ok(());
        }
        self.0.enter()?;
        let (from, stream) = (buffer.at + at as u64, self.0.compute.as_inner());
        // SAFETY: both sides hold that many bytes, any bytes are values of `T`, and the copy is waited for.
        let result = unsafe { sys::cuMemcpyDtoHAsync_v2(out.as_mut_ptr().cast(), from, bytes, stream) };
        check("copying from the device", result)?;
        self.wait()
    }

    /// Copies as many bytes as the shorter one has.
    pub(super) fn copy(&self, from: &Buffer, to: &Buffer) -> Result<()> {
        self.0.enter()?;
        let (bytes, stream) = (from.bytes.min(to.bytes), self.0.compute.as_inner());
        // SAFETY: both hold that many bytes.
        check("copying on the device", unsafe { sys::cuMemcpyDtoDAsync_v2(to.at, from.at, bytes, stream) })
    }

    /// Waits for all that was begun.
    fn wait(&self) -> Result<()> {
        self.0.compute.synchronize().map_err(|e| failed("waiting for the device", e))
    }

    /// Begins to run a kernel. Nothing is done on an empty grid.
    ///
    /// # Errors
    /// A grid that is larger than a device takes; what the driver reports, which may be of an earlier launch.
    ///
    /// # Panics
    /// If there is no such kernel or the arguments are not what it takes.
    pub(super) fn launch(&self, kernel: &str, shape: Shape, args: &[Arg]) -> Result<()> {
        let found = self.0.kernels.get(kernel);
        let Kernel { function, params_bytes } = found.unwrap_or_else(|| panic!("there is no kernel {kernel}"));
        assert!(
            args.iter().map(|arg| arg.size).eq(params_bytes.iter().copied()),
            "{kernel} takes parameters of {params_bytes:?} bytes"
        );
        let (x, y) = shape.grid;
        if x == 0 || y == 0 {
            return Ok(());
        }
        let (Ok(x), Ok(y @ ..=0xffff)) = (i32::try_from(x), u32::try_from(y)) else {
            return Err(Error::unsupported(format!("{kernel} on {x} × {y} blocks; a device takes 2^31 - 1 × 65535")));
        };
        self.0.enter()?;
        if shape.shared_bytes > 48 << 10 {
            let which = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: a function of a module that is loaded.
            let result = unsafe { sys::cuFuncSetAttribute(*function, which, shape.shared_bytes as i32) };
            check(&format!("asking for {} bytes of shared memory for {kernel}", shape.shared_bytes), result)?;
        }
        let mut params: Vec<*mut c_void> = args.iter().map(|arg| arg.bytes.as_ptr().cast_mut().cast()).collect();
        // SAFETY: a function of a module that is loaded, on a stream of its context, with as many arguments of such
        // sizes as it takes, which the driver copies before it returns.
        let result = unsafe {
            sys::cuLaunchKernel(
                *function,
                x as u32,
                y,
                1,
                shape.threads,
                1,
                1,
                shape.shared_bytes,
                self.0.compute.as_inner(),
                params.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        check(&format!("running {kernel}"), result)
    }

    /// Brings `values` up, each `narrow`ed on the way, beside the computation, and then into `to`.
    ///
    /// Two slots take turns: a batch is copied while the device still works on what was launched before, with another
    /// batch. Another thread may call this in the middle of a step: the device then waits for the last piece at most. Host
    /// memory is free again when this returns.
    ///
    /// # Panics
    /// If they do not fit.
    pub(super) fn upload<T: Plain + Send>(
        &self,
        values: &[f32],
        narrow: impl Fn(f32) -> T + Copy + Sync,
        to: &Buffer,
    ) -> Result<()> {
        let bytes = values.len() * size_of::<T>();
        assert!(bytes <= to.bytes, "{bytes} bytes for a buffer of {}", to.bytes);
        self.0.enter()?;
        let mut uploads = lock(&self.0.uploads);
        let next = uploads.next;
        uploads.next = 1 - next;
        let slot = &mut uploads.slots[next];
        slot.reserve(&self.0, bytes)?;
        let doing = "bringing activations to the device";
        // SAFETY: a stream and events of this context. The pinned memory, which the driver aligns for any type, holds
        // `bytes` bytes, any of which are values of `T`, and nothing reads it any more once `copied` is synchronized with.
        let pinned = unsafe {
            check(doing, sys::cuEventSynchronize(slot.copied))?;
            check(doing, sys::cuStreamWaitEvent(self.0.copies.as_inner(), slot.consumed, 0))?;
            std::slice::from_raw_parts_mut(slot.pinned.cast::<T>(), values.len())
        };
        let device = slot.device;
        let sent = in_pieces(values, pinned, |at, from, to| {
            self.0.enter()?;
            to.iter_mut().zip(from).for_each(|(to, from)| *to = narrow(*from));
            let (there, copies) = (device + (at * size_of::<T>()) as u64, self.0.copies.as_inner());
            // SAFETY: the device's memory holds `bytes` bytes too, and copies into it wait for `consumed`, which follows its
            // last reader; the piece lies within both.
            check(doing, unsafe { sys::cuMemcpyHtoDAsync_v2(there, to.as_ptr().cast(), size_of_val(to), copies) })
        });
        let (copies, compute) = (self.0.copies.as_inner(), self.0.compute.as_inner());
        // SAFETY: streams and events of this context; both memories hold `bytes` bytes.
        unsafe {
            // Also after a failure: copies may have begun.
            check(doing, sys::cuEventRecord(slot.copied, copies))?;
            sent?;
            check(doing, sys::cuStreamWaitEvent(compute, slot.copied, 0))?;
            check(doing, sys::cuMemcpyDtoDAsync_v2(to.at, device, bytes, compute))?;
            check("marking a copy as used", sys::cuEventRecord(slot.consumed, compute))
        }
    }
}

impl Inner {
    /// Makes the context current in this thread.
    fn enter(&self) -> Result<()> {
        CurrentContext::set_current(&self.context).map_err(|e| failed("entering the device's context", e))
    }

    /// Memory from the driver; if there is none, what nobody holds is given back to it first.
    fn allocate(&self, bytes: usize) -> Result<CUdeviceptr> {
        self.enter()?;
        let mut at = 0;
        // SAFETY: writes the address.
        let mut result = unsafe { sys::cuMemAlloc_v2(&mut at, bytes) };
        if result == CUresult::CUDA_ERROR_OUT_OF_MEMORY && self.release_pool() {
            // SAFETY: as above.
            result = unsafe { sys::cuMemAlloc_v2(&mut at, bytes) };
        }
        if result == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            let (mut free, mut total) = (0, 0);
            // SAFETY: writes two numbers. Should it fail, they stay 0.
            let _ = unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) };
            return Err(device_error(format!(
                "{}: out of memory: {bytes} bytes needed, {free} of {total} free; a smaller batch or dictionary needs less",
                self.name
            )));
        }
        check("allocating memory on the device", result)?;
        Ok(at)
    }

    /// Gives unused memory back to the driver; whether there was any.
    fn release_pool(&self) -> bool {
        let pool = std::mem::take(&mut *lock(&self.pool));
        // SAFETY: addresses from `cuMemAlloc`, each in the pool once and held by nobody; freeing waits for the kernels
        // that still use them. An error leaves nothing to be done.
        pool.free.values().flatten().for_each(|&at| unsafe {
            let _ = sys::cuMemFree_v2(at);
        });
        pool.count > 0
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Errors have been reported by the calls that met them, or have nobody left to care.
        if self.enter().is_ok() {
            let _ = self.compute.synchronize();
            let _ = self.copies.synchronize();
            self.release_pool();
            lock(&self.uploads).slots.iter_mut().for_each(Slot::release);
        }
    }
}

/// A poisoned lock means that another thread panicked; what it guards are lists of addresses, complete at any time.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// From 1 MiB on, an eighth of the next lower power of two is the unit, so that sizes that vary a little (the
/// support's) find each other's memory. Below, sizes are exact, which lets the tests see every access behind a buffer's
/// end.
fn pooled_bytes(bytes: usize) -> usize {
    match bytes {
        ..0x10_0000 => bytes,
        _ => bytes.next_multiple_of(1 << (bytes.ilog2() - 3)),
    }
}

impl Pool {
    /// More than this many are given back to the driver: sizes that never come again.
    const MOST: usize = 512;

    fn take(&mut self, bytes: usize) -> Option<CUdeviceptr> {
        let at = self.free.get_mut(&bytes)?.pop()?;
        self.count -= 1;
        Some(at)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut pool = lock(&self.gpu.0.pool);
        pool.free.entry(self.bytes).or_default().push(self.at);
        pool.count += 1;
        let full = pool.count > Pool::MOST;
        drop(pool);
        if full && self.gpu.0.enter().is_ok() {
            self.gpu.0.release_pool();
        }
    }
}

/// Where activations wait on their way up.
struct Uploads {
    slots: [Slot; 2],
    next: usize,
}

struct Slot {
    /// `capacity` bytes each, or null.
    pinned: *mut c_void,
    device: CUdeviceptr,
    capacity: usize,
    /// The pinned memory has been read.
    copied: CUevent,
    /// The device's memory has been read.
    consumed: CUevent,
}

impl Slot {
    fn new() -> Result<Self> {
        let event = || {
            let mut event = std::ptr::null_mut();
            let flags = sys::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING as u32;
            // SAFETY: writes the handle.
            check("making an event", unsafe { sys::cuEventCreate(&mut event, flags) })?;
            Ok(event)
        };
        Ok(Slot { pinned: std::ptr::null_mut(), device: 0, capacity: 0, copied: event()?, consumed: event()? })
    }

    /// Room for so many bytes, at least one.
    fn reserve(&mut self, gpu: &Inner, bytes: usize) -> Result<()> {
        let bytes = bytes.max(1);
        if bytes <= self.capacity {
            return Ok(());
        }
        gpu.compute.synchronize().map_err(|e| failed("waiting for the device", e))?;
        self.free_memory();
        // SAFETY: writes the address.
        check(&format!("asking for {bytes} bytes of pinned memory"), unsafe {
            sys::cuMemAllocHost_v2(&mut self.pinned, bytes)
        })?;
        self.device = gpu.allocate(bytes)?;
        self.capacity = bytes;
        Ok(())
    }

    /// Frees both memories, which nobody reads any more.
    fn free_memory(&mut self) {
        self.capacity = 0;
        // SAFETY: addresses from the driver, freed once; both streams have been waited for. Errors: nothing to be done.
        unsafe {
            if !self.pinned.is_null() {
                let _ = sys::cuMemFreeHost(self.pinned);
            }
            if self.device != 0 {
                let _ = sys::cuMemFree_v2(self.device);
            }
        }
        (self.pinned, self.device) = (std::ptr::null_mut(), 0);
    }

    fn release(&mut self) {
        self.free_memory();
        // SAFETY: events of this context, destroyed once.
        unsafe {
            let _ = sys::cuEventDestroy_v2(self.copied);
            let _ = sys::cuEventDestroy_v2(self.consumed);
        }
    }
}

/// Calls `f(at, from, to)` for pieces of both slices, `at` being where they begin, on as many threads as are of use: one
/// core copies some 10 GB/s, a batch is some 100 MB. Pieces are so small that the first is on its way soon.
fn in_pieces<T: Send>(
    from: &[f32],
    to: &mut [T],
    f: impl Fn(usize, &[f32], &mut [T]) -> Result<()> + Sync,
) -> Result<()> {
    const PIECE: usize = 1 << 19;
    let threads = threads::available().min(8).min(from.len().div_ceil(PIECE));
    let pieces = from.chunks(PIECE).zip(to.chunks_mut(PIECE)).enumerate();
    let failure = Mutex::new(Ok(()));
    threads::for_each(
        threads,
        pieces,
        || (),
        |_, (i, (from, to))| {
            if let Err(e) = f(i * PIECE, from, to) {
                *lock(&failure) = Err(e);
            }
        },
    );
    failure.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// The kernels of a PTX text, and for each the sizes of its parameters.
fn parse_entries(ptx: &str) -> impl Iterator<Item = (String, Vec<usize>)> + '_ {
    ptx.split(".entry ").skip(1).filter_map(|text| {
        let (name, rest) = text.split_once('(')?;
        let (params, _) = rest.split_once(')')?;
        let size = |param: &str| match param.split_whitespace().collect::<Vec<_>>()[..] {
            [_, ".u64" | ".b64" | ".s64" | ".f64", ..] => 8,
            [_, ".u32" | ".b32" | ".s32" | ".f32", ..] => 4,
            [_, ".align", "64", ".b8", array] if array.ends_with("[128]") => 128,
            _ => panic!("kernel {name} has the parameter {param:?}"),
        };
        let sizes = params.split(',').filter(|param| !param.trim().is_empty()).map(size).collect();
        Some((name.trim().to_owned(), sizes))
    })
}
