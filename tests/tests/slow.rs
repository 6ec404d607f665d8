//! A version that is worse than the one before.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use warmswap_tests::{LENIENT, Requirement, Store, needs};

const KEYS: usize = 200;
/// What version 3 cannot answer as fast as it comes: each request takes it 0.4 ms and more, one after the other.
const TOO_MUCH_PER_S: f64 = 2000.0;

#[test]
fn a_version_that_is_slower_is_rolled_back_and_nobody_loses_anything() {
    needs!(
        "a_version_that_is_slower_is_rolled_back_and_nobody_loses_anything",
        Requirement::Containers,
        Requirement::Bpf
    );
    // On a slow machine the version before cannot answer all of it either: then v3 is not even twice as slow.
    let limits = LENIENT.replace("p99_ratio_max = 1e6", "p99_ratio_max = 1.3").replace("min = 20\n", "min = 500\n");
    let store = Store::start("scenario-slow", &limits).unwrap();
    store.write_keys(KEYS).unwrap();
    let load = store.load_of(40, TOO_MUCH_PER_S).unwrap();
    std::thread::sleep(std::time::Duration::from_secs(3));

    let update = store.update("v3").unwrap();
    assert_eq!(update.verdict(), "rolled_back", "{}\n{:?}\n{}", update.reason(), update.report, store.log());
    // The median where a slow machine has answered too few for a p99.
    assert!(["p99 rose", "p50 rose"].iter().any(|rose| update.reason().starts_with(rose)), "{}", update.reason());
    assert_eq!(update.said.status, Some(3));
    let report = update.report.unwrap();
    assert_eq!(report["blackouts"].as_array().unwrap().len(), 2, "there and back: {report}");
    assert_eq!(store.owner().unwrap(), 1);
    store.check_keys(KEYS).unwrap();

    let result = load.stop().unwrap();
    assert!(result.totals.is_clean(), "{:?}\n{:?}", result.totals, result.faults);
    assert_eq!(result.connections_kept, result.connections);
    store.finish().unwrap();
}
