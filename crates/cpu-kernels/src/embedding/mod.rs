//! Picks rows of a table by id.

use half::bf16;

use crate::cpu::Cpu;
use crate::rows::{Rows, RowsMut};
use crate::share;

/// An id beyond the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("id {id} of a table of {rows} rows")]
pub struct NoSuchRow {
    pub id: i64,
    pub rows: usize,
}

/// `out[i] = table[ids[i]]`: [V, d], [T] -> [T, d].
///
/// # Errors
/// If an id is not a row of `table`; nothing has been written then.
///
/// # Panics
/// If shapes do not fit.
pub fn gather(
    cpu: &Cpu,
    table: Rows<bf16>,
    ids: &[i64],
    out: RowsMut<bf16>,
) -> Result<(), NoSuchRow> {
    assert_eq!(
        (out.rows(), out.cols()),
        (ids.len(), table.cols()),
        "out's shape"
    );
    let rows = table.rows();
    let inside = |&id: &i64| usize::try_from(id).is_ok_and(|id| id < rows);
    if let Some(&id) = ids.iter().find(|id| !inside(id)) {
        return Err(NoSuchRow { id, rows });
    }
    share::rows(cpu, ids.len(), table.cols(), |row| {
        // SAFETY: each row is taken once.
        let out = unsafe { out.part(row, 0, table.cols()) };
        out.copy_from_slice(table.row(ids[row] as usize));
    });
    Ok(())
}
