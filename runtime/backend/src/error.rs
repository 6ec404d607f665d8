//! Why a container could not be had.

use std::path::PathBuf;

use crate::contract::ContainerId;

#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    #[error("container {id} does not exist")]
    NoSuchContainer { id: ContainerId },
    #[error("container {id} exists already")]
    ContainerExists { id: ContainerId },
    #[error(
        "no image at {path}: give a root file system folder, an OCI bundle, or an image archive from `docker save`"
    )]
    NoSuchImage { path: PathBuf },
    #[error("image {path} is damaged: {problem}")]
    BadImage { path: PathBuf, problem: String },
    #[error("cannot listen on {address} for {name}")]
    Listen {
        name: String,
        address: warmswap_model::ListenAddress,
        #[source]
        source: std::io::Error,
    },
    #[error("cannot {action} {path}")]
    File {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("cannot {action} container {id}: {problem}")]
    Runtime { action: &'static str, id: ContainerId, problem: String },
    #[error("cannot {action} service {service}: {problem}")]
    Service { action: &'static str, service: warmswap_model::ServiceName, problem: String },
    #[error("{feature} is missing on this host: {remedy}")]
    Unsupported { feature: &'static str, remedy: &'static str },
}
