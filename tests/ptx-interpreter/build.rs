//! The name by which the dynamic linker knows NVIDIA's driver: who opens that name after this library gets this one.
fn main() {
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libcuda.so.1");
}
