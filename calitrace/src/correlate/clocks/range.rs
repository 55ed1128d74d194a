//! By how much a clock can be ahead, as far as packets limit it.

/// With packets of one direction only: so much earlier than it arrived, at least, the fastest left.
const SHORTEST: i64 = 1_000;

/// What the packets of a span leave possible.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Range {
    least: Option<i64>,
    most: Option<i64>,
}

impl Range {
    pub(super) fn with(self, difference: i64, from_here: bool) -> Self {
        if from_here {
            let most = Some(self.most.map_or(difference, |most| most.min(difference)));
            Self { most, ..self }
        } else {
            let least = self.least.max(Some(difference));
            Self { least, ..self }
        }
    }

    pub(super) fn is_contradiction(self) -> bool {
        // Each packet takes some time.
        matches!((self.least, self.most), (Some(least), Some(most)) if most.saturating_sub(least) < 2)
    }

    pub(super) fn middle(self) -> i64 {
        match (self.least, self.most) {
            (Some(least), Some(most)) => least + (most - least) / 2,
            (Some(least), None) => least + SHORTEST,
            (None, Some(most)) => most - SHORTEST,
            (None, None) => 0,
        }
    }

    pub(super) fn closest_to(self, ahead: i64) -> i64 {
        let ahead = self.least.map_or(ahead, |least| ahead.max(least + SHORTEST));
        self.most.map_or(ahead, |most| ahead.min(most - SHORTEST))
    }

    /// The value nearest to `ahead` that leaves time under way; as it is if nothing can be right.
    pub(super) fn towards(self, ahead: i64) -> i64 {
        match (self.least, self.most) {
            (Some(least), Some(most)) if least > most => ahead,
            (Some(least), Some(most)) if most - least < 2 * SHORTEST => least + (most - least) / 2,
            _ => self.closest_to(ahead),
        }
    }

    /// The nearest value that is possible.
    pub(super) fn nearest(self, ahead: i64) -> i64 {
        let ahead = self.least.map_or(ahead, |least| ahead.max(least + 1));
        self.most.map_or(ahead, |most| ahead.min(most - 1))
    }

    /// By how much `ahead` is wrong at most.
    pub(super) fn error_of(self, ahead: i64) -> Option<u64> {
        Some((self.most? - ahead).max(ahead - self.least?).unsigned_abs())
    }

    pub(super) fn half(self) -> Option<u64> {
        Some((self.most? - self.least?).unsigned_abs().div_ceil(2))
    }
}

pub(super) trait MaxKnown {
    fn max_known(self, other: Self) -> Self;
}

impl MaxKnown for Option<u64> {
    /// The larger, none if one is not known.
    fn max_known(self, other: Self) -> Self {
        Some(self?.max(other?))
    }
}
