//! Every interleaving that the memory model allows, for the two words that processes share. Run with
//! `RUSTFLAGS="--cfg loom" cargo test -p warmswap-transfer --test loom --release`

#![cfg(loom)]
#![allow(clippy::unwrap_used, reason = "a failed step fails the model")]

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::thread;
use warmswap_transfer::control::{ControlCell, ControlWord};
use warmswap_transfer::ownership::OwnershipCell;
use warmswap_transfer::publication::CommitCell;

/// Bytes of a segment as cells that loom watches: an unsynchronised read of one is an error of the model.
struct Memory {
    records: [UnsafeCell<u64>; 3],
    commit: CommitCell,
}

impl Memory {
    fn new() -> Self {
        Self { records: std::array::from_fn(|_| UnsafeCell::new(0)), commit: CommitCell::new(0) }
    }

    fn write(&self, at: usize, value: u64) {
        // SAFETY: loom checks that nobody reads or writes the cell at the same time.
        self.records[at].with_mut(|record| unsafe { *record = value });
    }

    fn read_committed(&self) -> Vec<u64> {
        let committed = self.commit.committed() as usize;
        // SAFETY: loom checks that the writer's store happened before.
        (0..committed).map(|at| self.records[at].with(|record| unsafe { *record })).collect()
    }
}

#[test]
fn a_follower_sees_whole_records_up_to_the_commit_and_nothing_else() {
    loom::model(|| {
        let memory = Arc::new(Memory::new());
        let writer = {
            let memory = Arc::clone(&memory);
            thread::spawn(move || {
                memory.write(0, 10);
                memory.commit.publish(1);
                // A batch: two records, one store.
                memory.write(1, 11);
                memory.write(2, 12);
                memory.commit.publish(3);
            })
        };
        let seen = memory.read_committed();
        assert!([&[][..], &[10], &[10, 11, 12]].contains(&&seen[..]), "{seen:?}");
        let again = memory.read_committed();
        assert!(again.len() >= seen.len());
        writer.join().unwrap();
        assert_eq!(memory.read_committed(), [10, 11, 12]);
    });
}

#[test]
fn an_heir_that_reads_the_control_word_sees_all_that_the_owner_published() {
    // Owner: append, publish, yield (a message; here the word 2 stored by the supervisor after the join of the message).
    loom::model(|| {
        let memory = Arc::new(Memory::new());
        let word = Arc::new(ControlCell::new(ControlWord { epoch: 1, owner: 1, orderly: true }));
        let handover = {
            let (memory, word) = (Arc::clone(&memory), Arc::clone(&word));
            thread::spawn(move || {
                memory.write(0, 10);
                memory.commit.publish(1);
                word.store(ControlWord { epoch: 2, owner: 2, orderly: true });
            })
        };
        let heir = {
            let (memory, word) = (Arc::clone(&memory), Arc::clone(&word));
            thread::spawn(move || {
                if word.load().owner == 2 {
                    assert_eq!(memory.read_committed(), [10]);
                    // The heir writes where the old owner never writes again.
                    memory.write(1, 20);
                    memory.commit.publish(2);
                }
            })
        };
        handover.join().unwrap();
        heir.join().unwrap();
    });
}

#[test]
fn at_no_time_do_two_processes_both_find_themselves_owner_after_the_yield() {
    // The old owner stops before the word changes (it yields) and asks the word before it writes; the new one asks too.
    loom::model(|| {
        let word = Arc::new(ControlCell::new(ControlWord { epoch: 1, owner: 1, orderly: true }));
        let visible = Arc::new(UnsafeCell::new(0_u32));
        let new = {
            let (word, visible) = (Arc::clone(&word), Arc::clone(&visible));
            thread::spawn(move || {
                if word.load().owner == 2 {
                    // SAFETY: loom checks that the old owner's write happened before.
                    visible.with_mut(|visible| unsafe { *visible += 1 });
                }
            })
        };
        if word.load().owner == 1 {
            // SAFETY: loom checks that the new owner's write does not happen at the same time.
            visible.with_mut(|visible| unsafe { *visible += 1 });
        }
        // Yielded, read by the supervisor:
        word.store(ControlWord { epoch: 2, owner: 2, orderly: true });
        new.join().unwrap();
    });
}

#[test]
fn of_two_generations_that_help_themselves_one_serves_and_sees_what_was_published() {
    // The owner appends, publishes and yields; then the supervisor stands still, and both it and its heir find that their
    // time has come.
    loom::model(|| {
        let memory = Arc::new(Memory::new());
        let lock = Arc::new(OwnershipCell::new());
        assert!(lock.try_acquire(1));
        let serving = Arc::new(UnsafeCell::new(0_u32));
        let serve = |memory: &Memory, lock: &OwnershipCell, serving: &UnsafeCell<u32>, generation: u32| {
            if !lock.try_acquire(generation) {
                return false;
            }
            // SAFETY: loom checks that nobody else serves at the same time.
            serving.with_mut(|serving| unsafe { *serving = generation });
            lock.begin_serving();
            assert_eq!(memory.read_committed()[0], 10, "everything the last holder published");
            assert!(lock.release(generation));
            true
        };
        let old = {
            let (memory, lock, serving) = (Arc::clone(&memory), Arc::clone(&lock), Arc::clone(&serving));
            thread::spawn(move || {
                memory.write(0, 10);
                memory.commit.publish(1);
                let servings = lock.servings();
                assert!(lock.release(1));
                if !lock.try_acquire(1) {
                    return false;
                }
                // SAFETY: loom checks that nobody else serves at the same time.
                let served = serving.with(|serving| unsafe { *serving } != 0);
                assert_eq!(lock.servings() != servings, served, "it knows whether anybody served since");
                serve(&memory, &lock, &serving, 1)
            })
        };
        let heir = serve(&memory, &lock, &serving, 2);
        let old = old.join().unwrap();
        assert!(old || heir, "somebody serves");
        assert_eq!(lock.holder(), 0);
    });
}

#[test]
fn a_supervisor_that_frees_the_lock_of_a_dead_generation_takes_it_from_nobody_else() {
    loom::model(|| {
        let lock = Arc::new(OwnershipCell::new());
        assert!(lock.try_acquire(1));
        let supervisor = {
            let lock = Arc::clone(&lock);
            thread::spawn(move || (lock.release(1), lock.release(1)))
        };
        let heir = lock.try_acquire(2);
        assert_eq!(supervisor.join().unwrap(), (true, false));
        assert_eq!(lock.holder(), if heir { 2 } else { 0 });
    });
}
