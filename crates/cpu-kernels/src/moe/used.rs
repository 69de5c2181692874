//! How evenly tokens choose their experts.

use super::Groups;

/// Over all sparse layers of all steps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Used {
    pub layers: u64,
    /// Experts that any token of a step chose, layer by layer.
    pub read: u64,
    /// Choices of each layer's busiest rank, or expert where ranks do not divide these.
    pub busiest: u64,
    /// Of each expert.
    pub choices: Vec<u64>,
}

impl Used {
    /// Count a layer, whose `experts` belong to ranks of `held` each.
    pub(super) fn count(&mut self, groups: &Groups, experts: usize, held: usize) {
        self.choices.resize(experts, 0);
        for (expert, choices) in self.choices.iter_mut().enumerate() {
            let here = groups.of(expert).len() as u64;
            *choices += here;
            self.read += u64::from(here > 0);
        }
        let each = if held < experts { held } else { 1 };
        let parts = (0..experts).step_by(each);
        let sizes = parts.map(|first| groups.of(first + each - 1).end - groups.of(first).start);
        self.busiest += sizes.max().unwrap_or_default() as u64;
        self.layers += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_busiest_is_an_expert_or_a_rank() {
        let mut groups = Groups::default();
        groups.regroup(&[2, 0, 2, 3, 2, 3], 4);
        let mut used = Used::default();
        used.count(&groups, 4, 4);
        let expected = Used {
            layers: 1,
            read: 3,
            busiest: 3,
            choices: vec![1, 0, 3, 2],
        };
        assert_eq!(used, expected);
        used.count(&groups, 4, 2);
        assert_eq!((used.layers, used.read, used.busiest), (2, 6, 3 + 5));
        assert_eq!(used.choices, [2, 0, 6, 4]);
    }
}
