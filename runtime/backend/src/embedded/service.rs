//! Opening and closing what the generations of a service share, from the agent's side; the helper process that does the
//! work is in `ground`.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Stdio;

use nix::mount::{MntFlags, umount2};
use warmswap_model::{Listen, ServiceName};

use super::wire::{GroundReply, GroundRequest};
use super::{EmbeddedBackend, LISTENER_PREFIX, LISTENERS_VERB, ground, lock, remove_empty_cgroups, sockets};
use crate::cgroup::file_error;
use crate::contract::{Backend, Result};
use crate::{BackendError, NamedFd, ServiceGround};

impl EmbeddedBackend {
    pub(super) fn open_ground(
        &self,
        service: &ServiceName,
        listen: &BTreeMap<String, Listen>,
    ) -> Result<ServiceGround> {
        let _guard = lock(&self.ground);
        let group = self.service_group(service);
        group.create()?;
        let mut found = self.find_listeners(service, listen);
        let missing: Vec<_> = listen
            .iter()
            .filter(|(name, _)| !found.contains_key(*name))
            .map(|(name, wanted)| (name.clone(), wanted.clone()))
            .collect();
        if !missing.is_empty() || !ground::is_netns(&self.layout.netns(service)) {
            // On a pure v2 host no process can join a group whose children have controllers.
            if !missing.is_empty() && !self.hierarchies.v2_controllers.is_empty() {
                if group.is_populated() {
                    let names: Vec<_> = missing.iter().map(|(name, _)| name.as_str()).collect();
                    return Err(BackendError::Service {
                        action: "open",
                        service: service.clone(),
                        problem: format!(
                            "listeners cannot be added while it runs ({}): stop it first",
                            names.join(", ")
                        ),
                    });
                }
                group.disable_for_children();
            }
            for named in self.run_ground_helper(service, missing)? {
                found.insert(named.name.clone(), named);
            }
        }
        group.enable_for_children();
        Ok(ServiceGround { cgroup: group.id()?, listeners: found.into_values().collect() })
    }

    pub(super) fn close_ground(&self, service: &ServiceName) -> Result<()> {
        let _guard = lock(&self.ground);
        let left: Vec<_> = self
            .layout
            .container_ids()
            .into_iter()
            .filter(|id| id.service == *service)
            .map(|id| id.generation.to_string())
            .collect();
        if !left.is_empty() {
            return Err(BackendError::Service {
                action: "close",
                service: service.clone(),
                problem: format!("containers are left: {}", left.join(", ")),
            });
        }
        sockets::remove_all(&self.layout.sockets(service))?;
        remove_netns(&self.layout.netns(service))?;
        self.service_group(service).remove()?;
        self.remove_empty_parents(service);
        Ok(())
    }

    /// Listeners of the service that a living shim keeps.
    fn find_listeners(&self, service: &ServiceName, listen: &BTreeMap<String, Listen>) -> BTreeMap<String, NamedFd> {
        let mut found = BTreeMap::new();
        for id in self.layout.container_ids().into_iter().filter(|id| id.service == *service) {
            let Ok(kept) = self.kept_fds(&id) else { continue };
            for named in kept {
                let Some(name) = named.name.strip_prefix(LISTENER_PREFIX) else { continue };
                if listen.get(name).is_some_and(|wanted| ground::listens_on(named.fd.as_fd(), wanted)) {
                    found.entry(name.to_owned()).or_insert(NamedFd { name: name.to_owned(), fd: named.fd });
                }
            }
        }
        found
    }

    /// Makes the network namespace where it is missing and opens the listeners that are missing.
    fn run_ground_helper(&self, service: &ServiceName, missing: Vec<(String, Listen)>) -> Result<Vec<NamedFd>> {
        let failed = |problem: String| BackendError::Service { action: "open", service: service.clone(), problem };
        let request = GroundRequest {
            service: service.clone(),
            listen: missing,
            cgroup_procs: self.service_group(service).v2().join("cgroup.procs"),
            netns: self.layout.netns(service),
            sockets: self.layout.sockets(service),
        };
        let (helper, mut child) = self
            .spawn_helper(&[LISTENERS_VERB.as_ref()], Stdio::inherit())
            .map_err(|error| failed(format!("cannot run {}: {error}", self.shim_exe.display())))?;
        let answer = (|| {
            helper.send(&request, &[]).map_err(|error| failed(error.to_string()))?;
            let mut listeners = Vec::new();
            loop {
                match helper.expect().map_err(|error| failed(format!("the helper process ended: {error}")))? {
                    (GroundReply::Listeners { names, last }, fds) => {
                        listeners.extend(names.into_iter().zip(fds).map(|(name, fd)| NamedFd { name, fd }));
                        if last {
                            return Ok(listeners);
                        }
                    }
                    (GroundReply::Listen { name, errno, problem }, _) => {
                        let wanted = request.listen.iter().find(|(n, _)| *n == name);
                        return Err(match wanted {
                            Some((_, wanted)) => BackendError::Listen {
                                address: wanted.address.clone(),
                                name,
                                source: errno.map_or_else(|| io::Error::other(problem), io::Error::from_raw_os_error),
                            },
                            None => failed(format!("the helper process answered for {name:?}")),
                        });
                    }
                    (GroundReply::Failed { problem }, _) => return Err(failed(problem)),
                }
            }
        })();
        drop(helper);
        // It has nothing left to do; in case it hangs, it must not be left behind.
        if answer.is_err() {
            let _ = child.kill();
        }
        let _ = child.wait();
        answer
    }

    /// Folders and groups that only existed for the sake of what was in them.
    fn remove_empty_parents(&self, service: &ServiceName) {
        let _ = fs::remove_dir(self.layout.containers_run().join(service.as_str()));
        let _ = fs::remove_dir(self.layout.state_dir.join("containers").join(service.as_str()));
        remove_empty_cgroups(&self.hierarchies, &self.layout);
    }
}

pub(super) fn remove_netns(path: &Path) -> Result<()> {
    if ground::is_netns(path) {
        umount2(path, MntFlags::MNT_DETACH).map_err(|errno| file_error("unmount", path)(errno.into()))?;
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(file_error("remove", path)(error)),
        _ => Ok(()),
    }
}
