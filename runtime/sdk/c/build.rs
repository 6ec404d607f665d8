//! Gives the shared library the name by which programs ask for it, whatever file it lies in.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libwarmswap.so.0");
}
