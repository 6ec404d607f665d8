//! The command line.

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use warmswap_model::ServiceName;

/// Update running containers with no dropped connection, no lost state and no cold-start dip.
#[derive(Debug, Parser)]
#[command(version, arg_required_else_help = true, max_term_width = 110)]
pub(crate) struct Args {
    /// Print one JSON document (or one a line, where things happen over time) instead of text.
    #[arg(long, global = true)]
    pub(crate) json: bool,

    /// Folder for sockets, mounts and containers.
    #[arg(long, global = true, env = "WARMSWAP_RUN_DIR", default_value = "/run/warmswap", hide_env_values = true)]
    pub(crate) run_dir: PathBuf,

    /// Folder for what is kept: history, models, image layers.
    #[arg(
        long,
        global = true,
        env = "WARMSWAP_STATE_DIR",
        default_value = "/var/lib/warmswap",
        hide_env_values = true
    )]
    pub(crate) state_dir: PathBuf,

    #[command(subcommand)]
    pub(crate) verb: Verb,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Say what this host can and cannot do for warmswap.
    Check,
    /// Run the agent in the foreground. `run` starts one by itself when there is none.
    ///
    /// The environment variable WARMSWAP_LOG says what it logs, as a filter of targets and levels; by default
    /// "info,warmswap_probes=off". With "info" the probes say what they lose, too.
    Agent,
    /// Start a service.
    Run {
        /// The service file (TOML).
        file: PathBuf,
    },
    /// Hand a service over to a new generation.
    Update {
        service: ServiceName,
        /// The new image: root file system folder, OCI bundle or image archive. Default: the present one.
        #[arg(long, short)]
        image: Option<PathBuf>,
        /// A changed service file; its image and settings hold from this handover on.
        #[arg(long, short, conflicts_with = "image")]
        file: Option<PathBuf>,
        /// For tests of crash safety: the agent stops itself (SIGSTOP) before this step of `history --steps`, from 1.
        #[arg(long, hide = true)]
        stop_agent_before_step: Option<usize>,
    },
    /// Hand a service back to the image it had before the last update.
    Rollback { service: ServiceName },
    /// Show the agent and its services.
    Status { service: Option<ServiceName> },
    /// End a service and remove everything of it.
    Stop {
        #[arg(required_unless_present = "all")]
        service: Option<ServiceName>,
        /// Every service, then the agent, then whatever a killed agent left behind.
        #[arg(long, conflicts_with = "service")]
        all: bool,
    },
    /// Show containers, what they use and what is forecast, live.
    ///
    /// Services, and containers that other tools started. Without a terminal, or with --json, one document a second.
    Top {
        /// Let the kernel measure the probes too; that lengthens every run of every BPF program on the host meanwhile.
        #[arg(long)]
        cost: bool,
        /// End after this many seconds with news.
        #[arg(long, short = 'n')]
        count: Option<u64>,
        /// End after this many seconds.
        #[arg(long)]
        seconds: Option<f64>,
    },
    /// Show events of services, and of containers that other tools started, as they happen.
    Trace {
        /// Only this service.
        #[arg(long, short)]
        service: Option<ServiceName>,
        /// Only this container of another tool: its name, or the beginning of its id.
        #[arg(long, conflicts_with = "service")]
        container: Option<String>,
        /// Only what this user did: a name or a number. The real user of the process, or whoever made the socket.
        #[arg(long, short)]
        user: Option<String>,
        /// Only events of these classes.
        #[arg(long, short, value_delimiter = ',')]
        class: Vec<String>,
        /// End after this many events.
        #[arg(long, short = 'n')]
        count: Option<u64>,
        /// End after this many seconds.
        #[arg(long)]
        seconds: Option<f64>,
    },
    /// Show what a service is expected to need, who says so, and how often it was right.
    Forecast { service: ServiceName },
    /// Show the handovers of a service.
    History {
        service: ServiceName,
        /// Every step of each handover too: where its time went.
        #[arg(long)]
        steps: bool,
        /// The phases of each handover too.
        #[arg(long)]
        phases: bool,
    },
    /// Run the main job on this host and show the result.
    Demo(DemoArgs),
    /// Print completions for a shell.
    Completions { shell: clap_complete::Shell },
    /// Write man pages into a folder.
    #[command(hide = true)]
    Man { folder: PathBuf },
}

#[derive(Debug, clap::Args)]
pub(crate) struct DemoArgs {
    /// Seconds of load before the first update, in which the forecast learns.
    #[arg(long, default_value_t = 150)]
    pub(crate) learn_s: u64,
    /// Seconds of load after each update.
    #[arg(long, default_value_t = 8)]
    pub(crate) between_s: u64,
    /// Connections of the load.
    #[arg(long, default_value_t = 64)]
    pub(crate) connections: usize,
    /// Requests a second, over all connections.
    #[arg(long, default_value_t = 2000.0)]
    pub(crate) rate: f64,
    /// Where the report goes.
    #[arg(long, default_value = "warmswap-demo.html")]
    pub(crate) report: PathBuf,
    /// Folder of the programs session-store-v1, -v2 and -v3. Default: beside this program.
    #[arg(long)]
    pub(crate) programs: Option<PathBuf>,
}
