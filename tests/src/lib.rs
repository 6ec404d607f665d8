//! What the end-to-end scenarios stand on: a place of its own for an agent ([`Ground`]), the command line as a user
//! calls it, images packed from our own programs, and an inventory of the machine that finds whatever is left behind
//! ([`Inventory`]).
//!
//! Not here: the scenarios themselves (`tests/tests/`), and anything that looks inside the runtime: scenarios see what
//! a user sees.
//!
//! The same scenario programs run on the host and in a virtual machine with pure cgroup v2 (`cargo xtask vm`).

mod agent;
pub mod board;
mod bpf;
pub mod channel;
pub mod faults;
mod ground;
pub mod hesitant;
pub mod hostile;
mod inventory;
mod requirements;
pub mod sequence;
mod store;
mod terminal;
mod wait;

pub use agent::Agent;
pub use ground::{Ground, Said, program};
pub use inventory::{Inventory, Leftovers};
pub use requirements::{Requirement, left_out, missing};
pub use store::{LENIENT, Settings, Store, Update};
pub use terminal::Terminal;
pub use wait::{SetOnDrop, eventually, within};

/// In the image of `plain-server`: what it answers.
pub const PLAIN_SERVER_VERSION: &str = "/etc/version";

/// Returns from the test, saying that it is left out, when one of the requirements is not met.
///
/// ```no_run
/// # use warmswap_tests::{needs, Requirement};
/// fn an_update_keeps_connections() {
///     needs!("an_update_keeps_connections", Requirement::Containers, Requirement::Program("redis-cli"));
/// }
/// ```
#[macro_export]
macro_rules! needs {
    ($test:expr, $($requirement:expr),+ $(,)?) => {
        if let Some(reason) = $crate::missing(&[$($requirement),+]) {
            $crate::left_out($test, &reason);
            return;
        }
    };
}
