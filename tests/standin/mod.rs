//! The stand-in for NVIDIA's driver, `tests/ptx-interpreter`: built on first use, and opened before the crate looks for
//! `libcuda.so.1`, which the dynamic linker then takes for found.

#![allow(dead_code, unreachable_pub, unsafe_code)] // Each test program uses a part of this.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

unsafe extern "C" {
    fn dlopen(path: *const c_char, mode: c_int) -> *mut c_void;
    fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
}

/// Whether the tests run on a real device: asked for by `CROSSCODER_TEST_GPU=1`, as `tests/gpu/run.sh` does.
pub fn real_gpu() -> bool {
    std::env::var("CROSSCODER_TEST_GPU").is_ok_and(|v| v == "1")
}

/// The repository: where this was built, or `CROSSCODER_ROOT` on another machine.
pub fn root() -> PathBuf {
    std::env::var_os("CROSSCODER_ROOT").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from)
}

/// Has the crate find the stand-in, unless the tests run on a real device. False, with the test's name and the reason
/// on stderr, where that cannot be; a panic instead if `CROSSCODER_REQUIRE_CUDA=1`.
pub fn ready(test: &str) -> bool {
    static READY: OnceLock<Result<(), String>> = OnceLock::new();
    match READY.get_or_init(|| if real_gpu() { Ok(()) } else { open() }) {
        Ok(()) => true,
        Err(why) => {
            let required = std::env::var("CROSSCODER_REQUIRE_CUDA").is_ok_and(|v| v == "1");
            assert!(!required, "{test} cannot run: {why}");
            eprintln!("NOT RUN: {test}: {why}");
            false
        }
    }
}

fn open() -> Result<(), String> {
    if !cfg!(target_os = "linux") {
        return Err("the stand-in for the driver is built for Linux".to_owned());
    }
    let root = root();
    let target = root.join("target/ptx-interpreter");
    let built = Command::new(env!("CARGO"))
        .args(["build", "--release", "--offline", "--quiet", "--manifest-path"])
        .arg(root.join("tests/ptx-interpreter/Cargo.toml"))
        .arg("--target-dir")
        .arg(&target)
        .status()
        .map_err(|e| format!("cannot run {}: {e}", env!("CARGO")))?;
    if !built.success() {
        return Err("the stand-in for the driver does not build".to_owned());
    }
    let library = target.join("release/libcuda.so");
    let path = CString::new(library.to_string_lossy().as_bytes()).map_err(|e| e.to_string())?;
    // SAFETY: a C string; the library has no initialisers of its own. 2: RTLD_NOW.
    match unsafe { dlopen(path.as_ptr(), 2) }.is_null() {
        true => Err(format!("cannot open {}", library.display())),
        false => {
            // A test that fails shows what the interpreter saw.
            let hook = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |info| {
                hook(info);
                let fault = fault();
                if !fault.is_empty() {
                    eprintln!("the interpreter's last fault: {fault}");
                }
            }));
            Ok(())
        }
    }
}

/// A function of the stand-in.
fn symbol(name: &CStr) -> *mut c_void {
    // SAFETY: C strings; 2 | 4: RTLD_NOW | RTLD_NOLOAD, the library that is open already.
    let found = unsafe { dlsym(dlopen(c"libcuda.so.1".as_ptr(), 2 | 4), name.as_ptr()) };
    assert!(!found.is_null(), "the stand-in has no {name:?}");
    found
}

macro_rules! calls {
    ($($(#[$doc:meta])* fn $name:ident($symbol:literal; $($arg:ident: $ty:ty as $c:ty = $convert:expr),*);)*) => {$(
        $(#[$doc])*
        pub fn $name($($arg: $ty),*) {
            // SAFETY: the function of this name in tests/ptx-interpreter/src/lib.rs has this signature.
            unsafe {
                let f = std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($c),*) -> c_int>(symbol($symbol));
                f($($convert),*);
            }
        }
    )*};
}

calls! {
    /// How many devices there are, the driver's CUDA version (12000 for 12.0), the compute capability.
    fn device(c"standin_device"; devices: i32 as c_int = devices, version: i32 as c_int = version, major: i32 as c_int = major, minor: i32 as c_int = minor);
    /// Bytes that the device has.
    fn memory(c"standin_memory"; limit: usize as usize = limit);
    /// Whether copies to the device are carried out when they are begun; otherwise when somebody waits for them.
    fn eager_copies(c"standin_eager_copies"; eager: bool as c_int = c_int::from(eager));
    /// Has the device fail with this code of the driver after so many more kernels.
    fn fail_after(c"standin_fail_after"; kernels: u64 as u64 = kernels, code: i32 as c_int = code);
    /// Has every later call fail with this code of the driver; 0: no longer.
    fn lose(c"standin_lose"; code: i32 as c_int = code);
}

/// Replaces the first `from` by `to` in the PTX of modules that are loaded while `f` runs.
pub fn planted<T>(from: &str, to: &str, f: impl FnOnce() -> T) -> T {
    type Plant = unsafe extern "C" fn(*const c_char, *const c_char) -> c_int;
    let (from, to) = (CString::new(from).unwrap(), CString::new(to).unwrap());
    // SAFETY: as above.
    let plant = unsafe { std::mem::transmute::<*mut c_void, Plant>(symbol(c"standin_plant")) };
    // SAFETY: C strings that live on.
    unsafe { plant(from.as_ptr(), to.as_ptr()) };
    let out = f();
    // SAFETY: null ends it.
    unsafe { plant(std::ptr::null(), std::ptr::null()) };
    out
}

/// What the last fault of a kernel was.
pub fn fault() -> String {
    text(c"standin_fault")
}

/// The names of the kernels that ran in this process since the last call.
pub fn kernels() -> Vec<String> {
    text(c"standin_kernels").lines().map(str::to_owned).collect()
}

fn text(function: &CStr) -> String {
    type Text = unsafe extern "C" fn(*mut c_char, usize) -> c_int;
    let mut text = vec![0u8; 0x4000];
    // SAFETY: as above; the text is cut to the size that is given.
    unsafe {
        let function = std::mem::transmute::<*mut c_void, Text>(symbol(function));
        function(text.as_mut_ptr().cast(), text.len());
    }
    CStr::from_bytes_until_nul(&text).unwrap().to_string_lossy().into_owned()
}

/// What was asked of the driver: `Counts` in tests/ptx-interpreter/src/lib.rs.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
pub struct Counts {
    pub launches: u64,
    pub ups: u64,
    pub up_bytes: u64,
    pub pageable_ups: u64,
    pub ups_in_turn: u64,
    pub downs: u64,
    pub down_bytes: u64,
    pub waits: u64,
}

/// What was asked of the driver since the last call.
pub fn counts() -> Counts {
    type Count = unsafe extern "C" fn(*mut Counts) -> c_int;
    let mut out = Counts::default();
    // SAFETY: as above; both sides have the same fields.
    unsafe { std::mem::transmute::<*mut c_void, Count>(symbol(c"standin_counts"))(&mut out) };
    out
}

/// A folder in which another process finds the stand-in as the driver, by `LD_LIBRARY_PATH`. [`ready`] has built it.
pub fn folder() -> PathBuf {
    let built = root().join("target/ptx-interpreter/release");
    let link = built.join("libcuda.so.1");
    if !link.exists() {
        // Another test program may be first.
        let _ = std::os::unix::fs::symlink("libcuda.so", &link);
        assert!(link.exists(), "cannot make {}", link.display());
    }
    built
}
