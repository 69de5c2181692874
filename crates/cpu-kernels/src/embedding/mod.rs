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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_picked_by_id_and_ids_beyond_the_table_are_refused() {
        let cpu = Cpu::new(2, 0).unwrap();
        let table: Vec<bf16> = (0..30).map(|i| bf16::from_f32(i as f32)).collect();
        let mut out = vec![bf16::ZERO; 9];
        let pick = |ids: &[i64], out: &mut [bf16]| {
            gather(&cpu, Rows::of(&table, 3), ids, RowsMut::of(out, 3))
        };
        assert_eq!(pick(&[9, 0, 9], &mut out), Ok(()));
        let whole = |id: usize| table[3 * id..][..3].to_vec();
        assert_eq!(out, [whole(9), whole(0), whole(9)].concat());
        for id in [-1, 10, i64::MAX] {
            assert_eq!(pick(&[1, id, 1], &mut out), Err(NoSuchRow { id, rows: 10 }));
        }
        assert_eq!(out[3..6], whole(0), "nothing was written");
        assert_eq!(pick(&[], &mut []), Ok(()));
    }
}
