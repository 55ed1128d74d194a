//! How far the clocks of two machines are apart, by the packets that went between them.
//!
//! A packet arrives after it left. So by what it came later, as the two clocks show it, is at least what the receiver's is
//! ahead, and with one that goes the other way at most: the fastest packets of both directions leave an interval, and its
//! middle is the estimate (NTP's on-wire protocol, RFC 5905 8, with packets that are there anyway). Pure, as the rest.
//!
//! Of packets with the same content, and of merged segments, nothing tells which is which. But the first that came is no earlier
//! than the first that left; so within that interval the estimate goes where they, too, arrive after they left. Only the TTL
//! tells a packet that comes round again from its like.

mod crossings;
mod range;

pub use crossings::Crossings;
use crossings::{Noted, Packets};
use range::{MaxKnown as _, Range};

/// Two sightings that are further from the usual difference than this are not of one packet: none is under way that long,
/// and clocks do not run apart that far in a capture.
const STRAY: i64 = 4_000_000_000;
/// The rate is estimated by the middle of each such span of time, in nanoseconds.
const SPAN: u64 = 1_000_000_000;
/// A line through the middles of fewer spans than this is chance.
const SPANS: usize = 10;

/// When a packet was seen there, and by how much that is later than here, as the two clocks show it.
#[derive(Clone, Copy, Debug)]
struct Sample {
    there: u64,
    difference: i64,
    /// It came from here: the difference is at least what the clock there is ahead. Else at most.
    from_here: bool,
    /// Seen at the uplinks, not at tunnel devices: next to the wire.
    uplink: bool,
    /// The one is the other, and not only as far as can be seen.
    sole: bool,
}

/// How far the clock of one machine is ahead of another's, over time.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Offset {
    /// Where the straight line begins that it is close to.
    origin: u64,
    rate: f64,
    /// From each time on: by how much it is ahead, beside what the rate makes since the origin. At least one, or it is none.
    steps: Vec<(u64, i64)>,
    bound: Option<u64>,
}

impl Offset {
    /// The same all the time; how exactly is not known.
    pub fn constant(ahead: i64) -> Self {
        Self {
            steps: vec![(0, ahead)],
            ..Self::default()
        }
    }

    /// How far the clock there is ahead of the one here; none when no packet was seen by both.
    pub fn between(here: &Crossings, there: &Crossings) -> Option<Self> {
        let mut samples = samples(here, there);
        let sole = samples.iter().filter(|sample| sample.sole);
        let mut differences: Vec<i64> = sole.map(|sample| sample.difference).collect();
        if differences.is_empty() {
            return None;
        }
        let middle = differences.len() / 2;
        let usual = *differences.select_nth_unstable(middle).1;
        samples.retain(|sample| (sample.difference - usual).abs() <= STRAY);
        samples.sort_by_key(|sample| sample.there);
        let (samples, others): (Vec<Sample>, Vec<Sample>) =
            samples.into_iter().partition(|sample| sample.sole);
        let origin = samples.first()?.there;
        // The slope has to explain the packets better than none does: fewer steps, or a wider way between them.
        let [straight, level] =
            [rate(origin, &samples), 0.0].map(|rate| Self::along(origin, rate, &samples, &others));
        let better =
            |one: &Self, other: &Self| (one.steps.len(), other.bound) < (other.steps.len(), one.bound);
        Some(if better(&straight, &level) {
            straight
        } else {
            level
        })
    }

    fn along(origin: u64, rate: f64, samples: &[Sample], others: &[Sample]) -> Self {
        let mut offset = Self {
            origin,
            rate,
            ..Self::default()
        };
        offset.step_through(samples, others);
        offset
    }

    /// Steps that no packet contradicts: as few as there can be. The clocks' own unsteadiness shows as their height.
    fn step_through(&mut self, samples: &[Sample], others: &[Sample]) {
        let (mut begun, mut first) = (self.origin, 0);
        let mut spans: Vec<(u64, Range)> = Vec::new();
        let mut range = Range::default();
        for (index, sample) in samples.iter().enumerate() {
            let with = self.narrowed(range, sample);
            if !with.is_contradiction() {
                range = with;
                continue;
            }
            let next = first + self.longest_silence(&samples[first..=index]);
            spans.push((begun, self.range(&samples[first..next])));
            begun = samples[next - 1].there.midpoint(samples[next].there);
            first = next;
            range = self.range(&samples[first..=index]);
        }
        spans.push((begun, range));
        let mut widest = Some(0);
        for (index, (begun, range)) in spans.iter().enumerate() {
            // The last one may be too short to have packets of both directions.
            let is_last = index + 1 == spans.len();
            let ahead = match self.steps.last() {
                Some((_, before)) if is_last && range.half().is_none() => range.closest_to(*before),
                _ => range.middle(),
            };
            let until = spans.get(index + 1).map_or(u64::MAX, |(next, _)| *next);
            let within = |sample: &&Sample| {
                index == 0 && sample.there < until || (*begun..until).contains(&sample.there)
            };
            let told = others
                .iter()
                .filter(within)
                .fold(Range::default(), |range, sample| self.narrowed(range, sample));
            let ahead = range.nearest(told.towards(ahead));
            if !(is_last && index > 0 && range.half().is_none()) {
                widest = widest.max_known(range.error_of(ahead));
            }
            self.steps.push((*begun, ahead));
        }
        let heights = self.steps.windows(2).map(|pair| pair[0].1.abs_diff(pair[1].1));
        let highest = heights.max().unwrap_or_default();
        self.bound = widest.map(|widest| widest + highest);
    }

    /// The last of these packets contradicts one before. Which one a step comes before: of those that agree with all that
    /// follow, the one after the longest silence. There the clocks ran apart unseen; and a step amid the sightings of a
    /// packet would change their order. Before it, there are packets of both directions, if there are any.
    fn longest_silence(&self, samples: &[Sample]) -> usize {
        let first = |from_here| samples.iter().position(|sample| sample.from_here == from_here);
        let both = first(true).max(first(false)).unwrap_or_default();
        let last = samples.len() - 1;
        let (mut place, mut longest) = (last, 0);
        let mut range = Range::default();
        for index in (both + 1..=last).rev() {
            range = self.narrowed(range, &samples[index]);
            if range.is_contradiction() {
                break;
            }
            let silence = samples[index].there - samples[index - 1].there;
            if silence > longest {
                (place, longest) = (index, silence);
            }
        }
        place
    }

    fn range(&self, samples: &[Sample]) -> Range {
        let narrowed = |range, sample| self.narrowed(range, sample);
        samples.iter().fold(Range::default(), narrowed)
    }

    fn narrowed(&self, range: Range, sample: &Sample) -> Range {
        range.with(sample.difference - self.run(sample.there), sample.from_here)
    }

    /// What the rate makes since the origin.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_precision_loss,
        reason = "a rate is below a thousandth, and a capture takes days at most"
    )]
    fn run(&self, there: u64) -> i64 {
        let since = i128::from(there) - i128::from(self.origin);
        (since as f64 * self.rate) as i64
    }

    /// Nanoseconds by which the clock there is ahead when it shows `there`.
    pub fn at(&self, there: u64) -> i64 {
        let next = self.steps.partition_point(|(since, _)| *since <= there);
        let step = self
            .steps
            .get(next.saturating_sub(1))
            .map_or(0, |(_, ahead)| *ahead);
        step + self.run(there)
    }

    /// A time there on the clock here.
    pub fn to_here(&self, there: u64) -> u64 {
        there.saturating_add_signed(self.at(there).saturating_neg())
    }

    /// The estimate is wrong by so many nanoseconds at most; none if packets went one way only.
    pub fn bound(&self) -> Option<u64> {
        self.bound
    }
}

fn samples(here: &Crossings, there: &Crossings) -> Vec<Sample> {
    let pairs = |from: &Packets, to: &Packets, from_here: bool| -> Vec<Sample> {
        let pair = |(key, left): (&u64, &Noted)| {
            // With a higher TTL than it left with it is an earlier pass, of which the leaving was not recorded.
            let came = to.get(key).filter(|came| came.ttl <= left.ttl)?;
            let (here, there) = if from_here {
                (left.time, came.time)
            } else {
                (came.time, left.time)
            };
            let difference = i64::try_from(i128::from(there) - i128::from(here)).ok()?;
            Some(Sample {
                there,
                difference,
                from_here,
                uplink: left.uplink,
                sole: left.sole && came.sole,
            })
        };
        from.iter().filter_map(pair).collect()
    };
    let mut samples = pairs(&here.left, &there.came, true);
    samples.extend(pairs(&there.left, &here.came, false));
    // Both directions are measured alike: at the uplinks, or, where these show encrypted packets only, at the tunnel devices.
    for at in [true, false] {
        let both = [true, false].map(|from_here| {
            let mut here = samples.iter();
            here.any(|sample| sample.sole && (sample.uplink, sample.from_here) == (at, from_here))
        });
        if both == [true; 2] {
            samples.retain(|sample| sample.uplink == at);
        }
    }
    samples
}

/// By how much the clock there runs faster: the slope of the line through the middles of the spans (least squares). A few
/// alone have none.
#[expect(
    clippy::cast_precision_loss,
    reason = "differences of times in one capture, and what is lost is far below a nanosecond a second"
)]
fn rate(origin: u64, samples: &[Sample]) -> f64 {
    let spans = samples.chunk_by(|one, two| (one.there - origin) / SPAN == (two.there - origin) / SPAN);
    let points: Vec<(f64, f64)> = spans
        .filter_map(|span| {
            let all = |range: Range, sample: &Sample| range.with(sample.difference, sample.from_here);
            let range = span.iter().fold(Range::default(), all);
            range.half()?;
            let time = span[0].there.midpoint(span[span.len() - 1].there) - origin;
            Some((time as f64, (range.middle() - samples[0].difference) as f64))
        })
        .collect();
    let count = points.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / count;
    let (time, ahead) = (mean(|point| point.0), mean(|point| point.1));
    let spread: f64 = points.iter().map(|point| (point.0 - time).powi(2)).sum();
    if points.len() < SPANS || spread == 0.0 {
        return 0.0;
    }
    let common: f64 = points
        .iter()
        .map(|point| (point.0 - time) * (point.1 - ahead))
        .sum();
    common / spread
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;
    use crate::correlate::properties::cases;

    const HERE: u64 = 500_000_000_000;

    /// A packet between the machines: when it leaves, how long it takes, and whether it comes from here.
    type Crossing = (u64, u64, bool);

    /// The two machines' views; the clock there is ahead and runs faster.
    fn views(crossings: &[Crossing], ahead: i64, ppm: i64) -> (Crossings, Crossings) {
        let (mut here, mut there) = (Crossings::default(), Crossings::default());
        add(&mut here, &mut there, crossings, ahead, ppm, true);
        (here, there)
    }

    /// More of them, each alone of its content or not.
    fn add(
        here: &mut Crossings,
        there: &mut Crossings,
        crossings: &[Crossing],
        ahead: i64,
        ppm: i64,
        sole: bool,
    ) {
        let noted = |time| Noted {
            time,
            uplink: true,
            ttl: 63,
            sole,
        };
        for (left, delay, from_here) in crossings {
            let key = u64::try_from(here.left.len() + here.came.len()).unwrap();
            let (from, to) = (HERE + left, HERE + left + delay);
            if *from_here {
                here.left.insert(key, noted(from));
                there.came.insert(key, noted(shown(to, ahead, ppm)));
            } else {
                there.left.insert(key, noted(shown(from, ahead, ppm)));
                here.came.insert(key, noted(to));
            }
        }
    }

    /// What the clock there shows at a time here.
    fn shown(time: u64, ahead: i64, ppm: i64) -> u64 {
        let faster = i64::try_from(time - HERE).unwrap() * ppm / 1_000_000;
        time.checked_add_signed(ahead + faster).unwrap()
    }

    proptest! {
        #![proptest_config(cases(1000))]

        /// A clock that runs as fast as the other is known within the bound; one that does not, nearly so. And no packet
        /// arrives before it left.
        #[test]
        fn the_estimate_is_within_its_bound(
            crossings in vec((0..20_000_000_000_u64, 20_000..3_000_000_u64, any::<bool>()), 2..300),
            ahead in -10_000_000_000..10_000_000_000_i64,
            ppm in prop_oneof![Just(0), -100..100_i64],
        ) {
            let (here, there) = views(&crossings, ahead, ppm);
            let offset = Offset::between(&here, &there).expect("there are crossings");
            for (left, delay, from_here) in crossings.iter().copied() {
                let (from, to) = (HERE + left, HERE + left + delay);
                let on_here = |time| offset.to_here(shown(time, ahead, ppm));
                let (departure, arrival) = if from_here { (from, on_here(to)) } else { (on_here(from), to) };
                prop_assert!(departure < arrival, "{departure} is not before {arrival}");
                let error = if from_here { arrival.abs_diff(to) } else { departure.abs_diff(from) };
                if let Some(bound) = offset.bound().filter(|_| ppm == 0) {
                    // Where the packets are few, a line is laid through what is no more than chance.
                    let chance = if offset.rate == 0.0 { 1 } else { 3_000_000 };
                    prop_assert!(error <= bound + chance, "{error} is more than {bound}");
                }
            }
        }
    }

    #[test]
    fn drift_is_followed() {
        // A packet each way every 100 ms for a minute, 100 µs under way; the clock there is 3 s ahead and gains 50 µs/s.
        let crossings: Vec<Crossing> = (0..1200)
            .map(|number| (number * 50_000_000, 100_000, number % 2 == 0))
            .collect();
        let (here, there) = views(&crossings, 3_000_000_000, 50);
        let offset = Offset::between(&here, &there).unwrap();
        let bound = offset.bound().unwrap();
        assert!((90_000..120_000).contains(&bound), "{bound}");
        for second in 0..60 {
            let time = HERE + second * 1_000_000_000;
            let error = offset.to_here(shown(time, 3_000_000_000, 50)).abs_diff(time);
            assert!(error < 10_000, "{error} ns at second {second}");
        }
    }

    #[test]
    fn a_step_is_in_the_silence_before_the_packets_that_show_it() {
        // Requests and answers, 10 µs under way, and after three seconds of silence others: the clock there has gained
        // 750 µs, which only the first answer contradicts.
        let exchange = |at| [(at, 10_000, true), (at + 30_000, 10_000, false)];
        let crossings = [exchange(0), exchange(1_000_000), exchange(3_000_000_000)].concat();
        let (here, there) = views(&crossings, 2_000_000_000, 250);
        let offset = Offset::between(&here, &there).unwrap();
        // What the machine there sees of the request, and of the answer before it leaves.
        let seen = [3_000_010_000, 3_000_015_000, 3_000_029_000, 3_000_030_000];
        let on_here = seen.map(|time| offset.to_here(shown(HERE + time, 2_000_000_000, 250)));
        assert!(on_here.is_sorted(), "{on_here:?}");
        assert!(
            HERE + 3_000_000_000 < on_here[0] && on_here[3] < HERE + 3_000_040_000,
            "{on_here:?}"
        );
    }

    #[test]
    fn packets_alike_keep_their_order_where_others_were_held_back() {
        // What comes from there takes 5 µs, what goes there 1 ms, but for some with the same content as others: 5 µs, too.
        let held: Vec<Crossing> = (0..20)
            .map(|number| {
                let from_here = number % 2 == 0;
                (
                    number * 1_000_000,
                    if from_here { 1_000_000 } else { 5_000 },
                    from_here,
                )
            })
            .collect();
        let fast: Vec<Crossing> = (0..5)
            .map(|number| (number * 2_000_000 + 500_000, 5_000, true))
            .collect();
        let ahead = 40_000_000_000;
        let (mut here, mut there) = views(&held, ahead, 0);
        add(&mut here, &mut there, &fast, ahead, 0, false);
        let offset = Offset::between(&here, &there).unwrap();
        for (left, delay, _) in fast {
            let arrival = offset.to_here(shown(HERE + left + delay, ahead, 0));
            assert!(HERE + left < arrival, "{} is not before {arrival}", HERE + left);
        }
        // The sole ones alone leave half of both ways' time; the truth is still within the bound.
        let error = offset.at(HERE).abs_diff(ahead);
        assert!(error <= 5_000, "{error}");
        assert!(offset.bound().unwrap() >= error);
    }

    #[test]
    fn one_direction_has_no_bound_and_keeps_the_order() {
        let crossings = [(0, 5_000, true), (1_000_000, 9_000, true)];
        let (here, there) = views(&crossings, -2_000_000_000, 0);
        let offset = Offset::between(&here, &there).unwrap();
        assert_eq!(offset.bound(), None);
        assert_eq!(
            offset.to_here(shown(HERE + 5_000, -2_000_000_000, 0)),
            HERE + 1_000
        );
    }

    #[test]
    fn a_stray_pair_is_left_out() {
        let mut crossings: Vec<Crossing> = (0..20)
            .map(|number| (number * 1_000_000, 50_000, number % 2 == 0))
            .collect();
        // Equal content half a minute apart: two packets, each seen by one machine only.
        crossings.push((1_000, 30_000_000_000, true));
        let (here, there) = views(&crossings, 7, 0);
        assert_eq!(Offset::between(&here, &there).unwrap().bound(), Some(50_000));
    }

    #[test]
    fn strangers_have_no_offset() {
        let (here, _) = views(&[(0, 10, true)], 0, 0);
        assert_eq!(Offset::between(&here, &Crossings::default()), None);
    }
}
