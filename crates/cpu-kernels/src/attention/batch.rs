//! Which rows of a step belong to which sequence, and where its blocks are.

use super::layout::Cache;

/// Neighbouring rows of a step that are neighbouring tokens of one sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    pub first_row: usize,
    /// Position in the sequence of the first row.
    pub start: usize,
    /// Rows.
    pub count: usize,
    /// The sequence's blocks are `tables[table_first..]`, one for each `block_tokens` positions.
    pub table_first: usize,
}

impl Span {
    /// One more than the last row's position.
    pub(super) fn end(&self) -> usize {
        self.start + self.count
    }
}

/// What `Batch::new` refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BatchError {
    #[error("span {0} is empty, or its positions are beyond 2^31")]
    Size(usize),
    #[error("span {0} begins before the one before it ends")]
    Order(usize),
    #[error("the tables end before span {0}'s blocks do")]
    Table(usize),
    #[error("block {block} in span {span}'s table; there are {blocks}")]
    Block {
        span: usize,
        block: i32,
        blocks: usize,
    },
    #[error("block {0} would be written by two spans")]
    Shared(i32),
}

/// A step's spans, checked.
#[derive(Clone, Copy)]
pub struct Batch<'a> {
    spans: &'a [Span],
    tables: &'a [i32],
    block_tokens: usize,
    blocks: usize,
}

impl<'a> Batch<'a> {
    /// For caches of `blocks` blocks of `block_tokens` tokens.
    ///
    /// # Errors
    /// If spans are empty or their rows overlap or go back, if tables are too short or name a block
    /// that does not exist, or if two spans would write into one block.
    pub fn new(
        spans: &'a [Span],
        tables: &'a [i32],
        block_tokens: usize,
        blocks: usize,
    ) -> Result<Self, BatchError> {
        let mut written = Vec::new();
        let mut next_row = 0;
        for (index, span) in spans.iter().enumerate() {
            let end = span.start.checked_add(span.count);
            let Some(end) = end.filter(|&end| span.count > 0 && end <= i32::MAX as usize) else {
                return Err(BatchError::Size(index));
            };
            if span.first_row < next_row {
                return Err(BatchError::Order(index));
            }
            next_row = span.first_row.saturating_add(span.count);
            let table = tables
                .get(span.table_first..)
                .and_then(|table| table.get(..end.div_ceil(block_tokens)))
                .ok_or(BatchError::Table(index))?;
            let inside = |&block: &i32| usize::try_from(block).is_ok_and(|block| block < blocks);
            if let Some(&block) = table.iter().find(|block| !inside(block)) {
                return Err(BatchError::Block {
                    span: index,
                    block,
                    blocks,
                });
            }
            written.extend_from_slice(&table[span.start / block_tokens..]);
        }
        written.sort_unstable();
        if let Some(pair) = written.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(BatchError::Shared(pair[0]));
        }
        Ok(Self {
            spans,
            tables,
            block_tokens,
            blocks,
        })
    }

    #[must_use]
    pub fn spans(&self) -> &'a [Span] {
        self.spans
    }

    /// One more than the last row.
    pub(super) fn rows(&self) -> usize {
        self.spans
            .last()
            .map_or(0, |span| span.first_row + span.count)
    }

    /// The block that holds `position` of a span's sequence.
    pub(super) fn block(&self, span: &Span, position: usize) -> usize {
        self.tables[span.table_first + position / self.block_tokens] as usize
    }

    /// # Panics
    /// If this batch was not checked for caches like `cache`.
    pub(super) fn check(&self, cache: &Cache) {
        assert_eq!(
            self.block_tokens,
            cache.layout().block_tokens(),
            "tokens of a block"
        );
        assert!(
            self.blocks <= cache.blocks(),
            "a cache of {} blocks",
            cache.blocks()
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(first_row: usize, start: usize, count: usize, table_first: usize) -> Span {
        Span {
            first_row,
            start,
            count,
            table_first,
        }
    }

    fn error(spans: &[Span], tables: &[i32]) -> Option<BatchError> {
        Batch::new(spans, tables, 16, 8).err()
    }

    #[test]
    fn what_does_not_fit_is_refused_by_name() {
        assert_eq!(error(&[], &[]), None);
        assert_eq!(
            error(&[span(0, 15, 18, 0), span(18, 0, 1, 3)], &[7, 0, 1, 2]),
            None
        );
        assert_eq!(error(&[span(0, 0, 0, 0)], &[0]), Some(BatchError::Size(0)));
        assert_eq!(
            error(&[span(0, usize::MAX, 2, 0)], &[0]),
            Some(BatchError::Size(0))
        );
        let overlap = [span(0, 0, 2, 0), span(1, 0, 1, 1)];
        assert_eq!(error(&overlap, &[0, 1]), Some(BatchError::Order(1)));
        assert_eq!(
            error(&[span(0, 0, 17, 0)], &[0]),
            Some(BatchError::Table(0))
        );
        assert_eq!(error(&[span(0, 0, 1, 9)], &[0]), Some(BatchError::Table(0)));
        for block in [-1, 8] {
            let refused = BatchError::Block {
                span: 0,
                block,
                blocks: 8,
            };
            assert_eq!(error(&[span(0, 0, 1, 0)], &[block]), Some(refused));
        }
    }

    #[test]
    fn two_spans_may_read_a_block_but_not_write_it() {
        let tables = [3, 4, 3, 5];
        assert_eq!(
            error(&[span(0, 16, 1, 0), span(1, 16, 1, 2)], &tables),
            None
        );
        let both = [span(0, 15, 2, 0), span(2, 15, 2, 2)];
        assert_eq!(error(&both, &tables), Some(BatchError::Shared(3)));
    }
}
