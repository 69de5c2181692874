//! Shares rows among the team.

use crate::cpu::Cpu;

/// Numbers that one task should at least go through: some microseconds of work.
const NUMBERS_PER_TASK: usize = 16 * 1024;

/// Call `each` once for every row below `rows`, each of which goes through `width` numbers.
pub(crate) fn rows(cpu: &Cpu, rows: usize, width: usize, each: impl Fn(usize) + Sync) {
    let together = (NUMBERS_PER_TASK / width.max(1)).clamp(1, rows.max(1));
    cpu.team.run(rows.div_ceil(together), |task, _| {
        let first = task * together;
        (first..rows.min(first + together)).for_each(&each);
    });
}
