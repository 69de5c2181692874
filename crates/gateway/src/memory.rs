//! Gives memory back to the system when a crowd has left.
//!
//! The allocator keeps what was freed for a while, and looks at what it keeps when it is called: after the last of
//! many streams has ended nobody calls it, and what they held would stay for as long as nobody comes.

use std::time::Duration;

use crate::app::App;

const LOOK_EVERY: Duration = Duration::from_secs(2);
/// Fewer requests at once hold nothing worth the trouble.
const MANY: usize = 8;

/// Looks at the load for ever: where the most at once has fallen to half of what it was or less, unused memory goes
/// back.
pub async fn give_back(app: &App) {
    let mut before = 0;
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let most = app.take_most_in_flight();
        let has_fallen = before >= MANY && before >= 2 * most;
        before = most;
        if has_fallen {
            // It takes milliseconds, in which the sockets' threads have better things to do.
            let _ = tokio::task::spawn_blocking(collect).await;
        }
    }
}

fn collect() {
    // What belongs to no thread is collected by any, but for one that has not allocated anything yet.
    drop(std::hint::black_box(Box::new(0_u8)));
    // SAFETY: it may be called at any time, by any thread; where mimalloc is not the allocator, it has nothing.
    unsafe { libmimalloc_sys::mi_collect(true) };
}
