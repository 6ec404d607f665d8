//! Only the helper processes of the embedded back end, for programs that cannot call [`warmswap_backend::internal_main`]
//! in their own `main`, such as tests run by the standard harness.

use std::process::ExitCode;

fn main() -> ExitCode {
    warmswap_backend::internal_main().unwrap_or_else(|| {
        eprintln!("this program is only for warmswap itself");
        ExitCode::FAILURE
    })
}
