//! Ranks as threads of one process, each with a mapping of its own.

use std::fs::File;
use std::os::fd::{AsFd, FromRawFd};
use std::thread;

use super::*;

/// Memory for `sizes`, zeroed.
pub(crate) fn shared(sizes: Sizes) -> File {
    // SAFETY: a name that ends with a zero; the descriptor is checked, and nobody else's.
    let file = unsafe {
        let descriptor = libc::memfd_create(c"ranks".as_ptr(), 0);
        assert!(descriptor >= 0);
        File::from_raw_fd(descriptor)
    };
    file.set_len(sizes.bytes() as u64).unwrap();
    file
}

/// Run `body` as each of the ranks, and give what they returned.
pub(crate) fn on_ranks<T: Send>(sizes: Sizes, body: impl Fn(&mut Ranks) -> T + Sync) -> Vec<T> {
    let (file, body) = (shared(sizes), &body);
    thread::scope(|scope| {
        let handles: Vec<_> = (0..sizes.ranks)
            .map(|rank| {
                let region = Arc::new(Region::map(file.as_fd(), sizes).unwrap());
                scope.spawn(move || body(&mut Ranks::new(region, rank)))
            })
            .collect();
        let joined = handles.into_iter().map(|handle| handle.join().unwrap());
        joined.collect()
    })
}

fn sizes(ranks: usize) -> Sizes {
    Sizes {
        ranks,
        letter_bytes: 100,
        slot_bytes: 64,
    }
}

#[test]
fn every_round_gives_everybody_every_part() {
    for count in [1, 2, 3, 8] {
        on_ranks(sizes(count), |ranks| {
            for round in 0..300_u32 {
                let mine = ranks.mine::<u32>(1, 2);
                // SAFETY: the only slice of it.
                unsafe { mine.part(0, 0, 2) }.copy_from_slice(&[round, ranks.rank() as u32]);
                ranks.meet().unwrap();
                let parts = ranks.parts::<u32>(1, 2);
                for (rank, part) in (0..).zip(parts) {
                    assert_eq!(part.row(0), [round, rank]);
                }
            }
        });
    }
}

#[test]
fn a_slow_link_takes_its_time_and_no_more_than_its_bytes() {
    let link = Link {
        megabytes_s: NonZeroU32::new(2).unwrap(),
    };
    assert_eq!(link.takes(64), Duration::from_micros(32));
    assert_eq!(link.takes(0), Duration::ZERO);
    on_ranks(sizes(2), |ranks| {
        let alone = Ranks::new(Arc::clone(&ranks.region), ranks.rank());
        let mut slow = alone.over(link);
        for round in 0..3_u32 {
            let began = Instant::now();
            // SAFETY: the only slice of it.
            unsafe { slow.mine::<u32>(1, 16).part(0, 0, 16) }.fill(round);
            slow.meet().unwrap();
            assert!(began.elapsed() >= link.takes(64));
            assert!(
                slow.parts::<u32>(1, 16)
                    .iter()
                    .all(|part| part.row(0) == [round; 16])
            );
        }
    });
}

#[test]
fn letters_arrive_whole_and_in_order() {
    let expected: Vec<Vec<u8>> = (0..100).map(|i| vec![i; usize::from(i)]).collect();
    on_ranks(sizes(3), |ranks| {
        for letter in &expected {
            if ranks.rank() == 0 {
                ranks.send(letter).unwrap();
            } else {
                assert_eq!(&ranks.receive().unwrap(), letter);
            }
        }
    });
}

#[test]
fn whoever_waits_for_a_rank_that_gave_up_is_told() {
    let found = on_ranks(sizes(3), |ranks| match ranks.rank() {
        0 => ranks.meet(),
        1 => ranks.receive().map(drop),
        _ => {
            ranks.region.give_up();
            Ok(())
        }
    });
    assert_eq!(found, [Err(RankLost), Err(RankLost), Ok(())]);
}

#[test]
fn memory_that_is_too_small_is_refused() {
    let file = shared(sizes(2));
    let larger = Sizes {
        slot_bytes: 1 << 20,
        ..sizes(2)
    };
    assert!(Region::map(file.as_fd(), larger).is_err());
}

#[test]
#[should_panic(expected = "for a slot of 64")]
fn parts_that_no_slot_holds_are_refused() {
    let file = shared(sizes(2));
    let region = Arc::new(Region::map(file.as_fd(), sizes(2)).unwrap());
    Ranks::new(region, 0).mine::<u32>(17, 1);
}
