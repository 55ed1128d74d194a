//! Which netfilter rule dropped a packet, or gives it another source: rules as `iptables-save` and `nft` write them, followed
//! for one packet as far as is known of it. Pure; who reads the rules and whose packet it is are the callers' affairs.
//!
//! The kernel says that netfilter dropped a packet, and not by which rule. All that a packet may have met on its way is
//! followed here, with three answers to each match: yes, no, and perhaps (a set whose members are not known, a packet whose
//! connection is not known). The drops that can be reached are the candidates; where it is one, that was it.

mod culprit;
mod elements;
mod logged;
mod marks;
mod meaning;
mod nft;
mod outgoing;
mod packet;
mod rules;
mod save;
mod sets;
mod tiers;
mod translated;
mod vxlan;
mod walk;

pub use culprit::{Cause, Culprit, Direction, Limited, PolicyName};
pub use logged::{Action, By, Logged, Logger};
pub use nft::{Sources, compact as compact_nft, compact_with_nat as compact_nft_with_nat};
pub use packet::{Asked, Device, States};
pub use rules::Ruleset;
pub use sets::Sets;
pub use translated::translated;
pub use walk::Hook;

#[cfg(test)]
mod felix;
#[cfg(test)]
mod tests;
