//! What a tick found that somebody should hear of: trouble that begins or ends, processes killed for want of memory.

use std::collections::BTreeMap;

use warmswap_model::{FeatureWindow, ServiceName};

use crate::api::NewsKind;
use crate::lock;
use crate::shared::Shared;

/// What has been told.
#[derive(Debug, Default)]
pub(crate) struct Alarms {
    troubled: BTreeMap<ServiceName, String>,
}

impl Alarms {
    pub(crate) fn look(&mut self, shared: &Shared, windows: &[(ServiceName, FeatureWindow)]) {
        for (name, window) in windows.iter().filter(|(_, window)| window.counts.oom_kills > 0) {
            shared.live.tell(NewsKind::OomKill, name.as_str(), killed(window.counts.oom_kills));
        }
        let now: BTreeMap<ServiceName, Option<String>> = shared
            .services()
            .into_iter()
            .map(|handle| (handle.name.clone(), lock(&handle.snapshot).trouble.clone()))
            .collect();
        for (name, kind, text) in self.changes(&now) {
            shared.live.tell(kind, name.as_str(), text);
        }
    }

    fn changes(&mut self, now: &BTreeMap<ServiceName, Option<String>>) -> Vec<(ServiceName, NewsKind, String)> {
        let mut changes = Vec::new();
        // Whoever has ended is in no trouble, and has not recovered either.
        self.troubled.retain(|name, _| now.contains_key(name));
        for (name, trouble) in now {
            match trouble {
                Some(text) if self.troubled.get(name) != Some(text) => {
                    self.troubled.insert(name.clone(), text.clone());
                    changes.push((name.clone(), NewsKind::Trouble, text.clone()));
                }
                Some(_) => {}
                None if self.troubled.remove(name).is_some() => {
                    changes.push((name.clone(), NewsKind::Recovered, "is out of trouble".into()));
                }
                None => {}
            }
        }
        changes
    }
}

pub(crate) fn killed(processes: u64) -> String {
    match processes {
        1 => "a process was killed for want of memory".into(),
        n => format!("{n} processes were killed for want of memory"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trouble_is_told_once_and_so_is_its_end() {
        let mut alarms = Alarms::default();
        let shop = ServiceName::new("shop").expect("a name");
        let mut look = |trouble: Option<&str>| {
            let now = BTreeMap::from([(shop.clone(), trouble.map(str::to_owned))]);
            alarms.changes(&now).into_iter().map(|(_, kind, text)| (kind, text)).collect::<Vec<_>>()
        };
        assert_eq!(look(None), []);
        assert_eq!(look(Some("it fell")), [(NewsKind::Trouble, "it fell".to_owned())]);
        assert_eq!(look(Some("it fell")), []);
        assert_eq!(look(Some("it fell again")).len(), 1);
        assert_eq!(look(None), [(NewsKind::Recovered, "is out of trouble".to_owned())]);
        assert_eq!(look(None), []);
    }
}
