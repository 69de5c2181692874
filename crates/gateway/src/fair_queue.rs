//! Who is next: classes in order, tenants within a class by weighted fair queueing of tokens.
//!
//! Every request of a tenant has a start tag, `max(virtual time, the tenant's finish tag)`, and moves the finish tag on
//! by `cost / weight`. The least start tag goes first, and is the new virtual time (start-time fair queueing): whoever
//! was idle starts now and has saved nothing up, and over any time in which two tenants both wait their tokens differ
//! from their weights' ratio by at most one request of each.

use std::collections::{HashMap, VecDeque};

use scalellm_accounts::Class;

/// Finish tags of tenants that do not wait; beyond this many those that mean nothing any more are dropped.
const MAX_IDLE_TENANTS: usize = 4096;

/// What a request asks for.
#[derive(Debug, Clone, PartialEq)]
pub struct Ask {
    pub class: Class,
    pub tenant: String,
    pub weight: f64,
    /// Places it takes: its choices.
    pub units: usize,
    /// Tokens, estimated.
    pub cost: f64,
}

#[derive(Debug)]
pub struct FairQueue<T> {
    classes: [Lane<T>; Class::ALL.len()],
    len: usize,
}

#[derive(Debug)]
struct Lane<T> {
    virtual_time: f64,
    tenants: HashMap<String, Tenant<T>>,
    len: usize,
}

#[derive(Debug)]
struct Tenant<T> {
    finish: f64,
    waiting: VecDeque<(u64, Ask, T)>,
}

impl<T> Default for FairQueue<T> {
    fn default() -> Self {
        FairQueue {
            classes: Class::ALL.map(|_| Lane {
                virtual_time: 0.0,
                tenants: HashMap::new(),
                len: 0,
            }),
            len: 0,
        }
    }
}

impl<T> FairQueue<T> {
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    #[must_use]
    pub fn len_of(&self, class: Class) -> usize {
        self.classes[class as usize].len
    }

    /// How many wait that go before a newcomer of this class, other tenants' share aside.
    #[must_use]
    pub fn ahead_of(&self, class: Class) -> usize {
        self.classes[..=class as usize]
            .iter()
            .map(|lane| lane.len)
            .sum()
    }

    /// Counts a request that did not have to wait.
    pub fn charge(&mut self, ask: &Ask) {
        let lane = &mut self.classes[ask.class as usize];
        let tenant = lane.tenant(&ask.tenant);
        let start = tenant.finish;
        tenant.finish = start + ask.cost / ask.weight;
        lane.virtual_time = start;
        lane.tidy();
    }

    /// Corrects a tenant's account by what its request really cost, in tokens more or less.
    pub fn correct(&mut self, ask: &Ask, more: f64) {
        if let Some(tenant) = self.classes[ask.class as usize]
            .tenants
            .get_mut(&ask.tenant)
        {
            tenant.finish += more / ask.weight;
        }
    }

    pub fn push(&mut self, id: u64, ask: Ask, item: T) {
        let lane = &mut self.classes[ask.class as usize];
        lane.tenant(&ask.tenant).waiting.push_back((id, ask, item));
        lane.len += 1;
        self.len += 1;
    }

    /// The next request, if it `fits`. One that does not fit is not overtaken: it would wait for ever.
    pub fn pop(&mut self, fits: impl Fn(&Ask) -> bool) -> Option<(Ask, T)> {
        let lane = self.classes.iter_mut().find(|lane| lane.len > 0)?;
        let (_, name) = lane
            .tenants
            .iter()
            .filter(|(_, tenant)| !tenant.waiting.is_empty())
            .map(|(name, tenant)| (tenant.finish.max(lane.virtual_time), name))
            // Equal tags: by name, so that the order does not hang on the table's.
            .min_by(|a, b| a.0.total_cmp(&b.0).then_with(|| a.1.cmp(b.1)))?;
        let name = name.clone();
        let tenant = lane.tenants.get_mut(&name)?;
        if !fits(&tenant.waiting.front()?.1) {
            return None;
        }
        let (_, ask, item) = tenant.waiting.pop_front()?;
        lane.len -= 1;
        self.len -= 1;
        let start = tenant.finish.max(lane.virtual_time);
        tenant.finish = start + ask.cost / ask.weight;
        lane.virtual_time = start;
        lane.tidy();
        Some((ask, item))
    }

    /// Takes back a request that does not want to wait any longer.
    pub fn remove(&mut self, id: u64, class: Class, tenant: &str) -> Option<T> {
        let lane = &mut self.classes[class as usize];
        let waiting = &mut lane.tenants.get_mut(tenant)?.waiting;
        let place = waiting.iter().position(|(waiting, _, _)| *waiting == id)?;
        let (_, _, item) = waiting.remove(place)?;
        lane.len -= 1;
        self.len -= 1;
        Some(item)
    }

    /// Gives up a request so that one of `class` can wait: the newest of the tenant that has most waiting, in the
    /// lowest class that waits, if that is below `class`.
    pub fn shed_below(&mut self, class: Class) -> Option<T> {
        let lane = self.classes[class as usize + 1..]
            .iter_mut()
            .rev()
            .find(|lane| lane.len > 0)?;
        let longest = lane
            .tenants
            .values_mut()
            .max_by_key(|tenant| tenant.waiting.len())?;
        let (_, _, item) = longest.waiting.pop_back()?;
        lane.len -= 1;
        self.len -= 1;
        Some(item)
    }
}

impl<T> Lane<T> {
    /// The tenant, whose finish tag is not in the past.
    fn tenant(&mut self, name: &str) -> &mut Tenant<T> {
        let now = self.virtual_time;
        let tenant = self
            .tenants
            .entry(name.to_owned())
            .or_insert_with(|| Tenant {
                finish: now,
                waiting: VecDeque::new(),
            });
        tenant.finish = tenant.finish.max(now);
        tenant
    }

    fn tidy(&mut self) {
        if self.tenants.len() > MAX_IDLE_TENANTS {
            let now = self.virtual_time;
            self.tenants
                .retain(|_, tenant| !tenant.waiting.is_empty() || tenant.finish > now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ask(class: Class, tenant: &str, weight: f64, cost: f64) -> Ask {
        Ask {
            class,
            tenant: tenant.to_owned(),
            weight,
            units: 1,
            cost,
        }
    }

    #[test]
    fn classes_go_in_order() {
        let mut queue = FairQueue::default();
        for (id, class) in [Class::Batch, Class::Standard, Class::Interactive]
            .into_iter()
            .enumerate()
        {
            queue.push(id as u64, ask(class, "a", 1.0, 1.0), class);
        }
        let order: Vec<Class> =
            std::iter::from_fn(|| queue.pop(|_| true).map(|(_, class)| class)).collect();
        assert_eq!(order, Class::ALL);
    }

    #[test]
    fn tokens_follow_weights_and_not_the_number_of_requests() {
        let mut queue = FairQueue::default();
        for id in 0..400 {
            queue.push(id, ask(Class::Standard, "many small", 1.0, 10.0), ());
        }
        for id in 400..440 {
            queue.push(id, ask(Class::Standard, "few large", 3.0, 100.0), ());
        }
        let mut tokens = HashMap::new();
        for _ in 0..120 {
            let (ask, ()) = queue.pop(|_| true).unwrap();
            *tokens.entry(ask.tenant).or_insert(0.0) += ask.cost;
        }
        let ratio = tokens["few large"] / tokens["many small"];
        assert!((2.6..3.4).contains(&ratio), "{tokens:?}");
    }

    #[test]
    fn who_was_idle_has_saved_nothing_up() {
        let mut queue = FairQueue::default();
        for _ in 0..1000 {
            queue.charge(&ask(Class::Standard, "busy", 1.0, 100.0));
        }
        for id in 0..20 {
            let tenant = if id % 2 == 0 { "busy" } else { "idle" };
            queue.push(id, ask(Class::Standard, tenant, 1.0, 100.0), tenant);
        }
        let first: Vec<&str> = (0..10).map(|_| queue.pop(|_| true).unwrap().1).collect();
        assert_eq!(first.iter().filter(|tenant| **tenant == "busy").count(), 5);
    }

    #[test]
    fn what_does_not_fit_is_not_overtaken() {
        let mut queue = FairQueue::default();
        let large = Ask {
            units: 8,
            ..ask(Class::Standard, "a", 1.0, 1.0)
        };
        queue.push(0, large, "large");
        queue.push(1, ask(Class::Standard, "b", 1.0, 1.0), "small");
        assert_eq!(queue.pop(|ask| ask.units <= 4), None);
        assert_eq!(queue.pop(|_| true).unwrap().1, "large");
    }

    #[test]
    fn the_lowest_class_is_shed_first_and_never_ones_own() {
        let mut queue = FairQueue::default();
        queue.push(0, ask(Class::Standard, "a", 1.0, 1.0), "standard");
        queue.push(1, ask(Class::Batch, "b", 1.0, 1.0), "one");
        queue.push(2, ask(Class::Batch, "c", 1.0, 1.0), "old");
        queue.push(3, ask(Class::Batch, "c", 1.0, 1.0), "new");
        assert_eq!(queue.shed_below(Class::Batch), None);
        assert_eq!(queue.shed_below(Class::Interactive), Some("new"));
        assert_eq!(queue.remove(1, Class::Batch, "b"), Some("one"));
        assert_eq!(queue.shed_below(Class::Standard), Some("old"));
        assert_eq!(queue.shed_below(Class::Standard), None);
        assert_eq!(queue.len(), 1);
    }

    proptest! {
        #[test]
        fn nobody_is_lost_and_nobody_twice(
            asks in proptest::collection::vec((0..3_usize, 0..4_usize, 1..5_u32, 0..100_u32), 1..100),
            removed in 0..100_usize,
        ) {
            let mut queue = FairQueue::default();
            for (id, (class, tenant, weight, cost)) in asks.iter().enumerate() {
                let ask = ask(Class::ALL[*class], &tenant.to_string(), f64::from(*weight), f64::from(*cost));
                queue.push(id as u64, ask, id);
            }
            let mut seen = Vec::new();
            if let Some((class, tenant, ..)) = asks.get(removed) {
                seen.extend(queue.remove(removed as u64, Class::ALL[*class], &tenant.to_string()));
            }
            while let Some((_, id)) = queue.pop(|_| true) {
                seen.push(id);
            }
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..asks.len()).collect::<Vec<_>>());
            prop_assert_eq!(queue.len(), 0);
        }
    }
}
