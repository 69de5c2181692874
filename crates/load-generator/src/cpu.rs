/// Processor time of the calling thread, from the kernel's scheduler (Linux; absent elsewhere).
#[derive(Debug, Clone, Copy)]
pub(crate) struct ThreadCpu {
    pub run_s: f64,
    /// Ready to run, waiting for a core.
    pub wait_s: f64,
}

impl ThreadCpu {
    pub fn now() -> Option<ThreadCpu> {
        let text = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
        let mut ns = text
            .split_whitespace()
            .map(|field| field.parse::<u64>().ok());
        Some(ThreadCpu {
            run_s: ns.next()?? as f64 / 1e9,
            wait_s: ns.next()?? as f64 / 1e9,
        })
    }

    pub fn since(self, earlier: ThreadCpu) -> ThreadCpu {
        ThreadCpu {
            run_s: self.run_s - earlier.run_s,
            wait_s: self.wait_s - earlier.wait_s,
        }
    }
}
