//! Sleeping on a word of shared memory until another process wakes whoever sleeps there.

use std::sync::atomic::AtomicU32;
use std::time::Duration;

/// Sleep while `word` is `seen`, until woken, or for `limit`; or for no reason, less.
#[cfg(target_os = "linux")]
pub(super) fn wait(word: &AtomicU32, seen: u32, limit: Duration) {
    let limit = libc::timespec {
        tv_sec: limit.as_secs().cast_signed(),
        tv_nsec: i64::from(limit.subsec_nanos()),
    };
    // SAFETY: a living word and time; the caller looks at the word again whatever comes back.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAIT,
            seen,
            &raw const limit,
        );
    }
}

#[cfg(target_os = "linux")]
pub(super) fn wake_all(word: &AtomicU32) {
    // SAFETY: a living word.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX) };
}

/// Without futexes a sleeper looks again after a moment.
#[cfg(not(target_os = "linux"))]
pub(super) fn wait(_word: &AtomicU32, _seen: u32, limit: Duration) {
    std::thread::sleep(limit.min(Duration::from_micros(100)));
}

#[cfg(not(target_os = "linux"))]
pub(super) fn wake_all(_word: &AtomicU32) {}
