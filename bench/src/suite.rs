//! What a suite comes to.

use crate::rows::Row;

#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) rows: Vec<Row>,
    /// What must never be and was: the run fails, with its rows written all the same.
    pub(crate) violations: Vec<String>,
}

impl Outcome {
    pub(crate) fn add(&mut self, other: Self) {
        self.rows.extend(other.rows);
        self.violations.extend(other.violations);
    }
}
