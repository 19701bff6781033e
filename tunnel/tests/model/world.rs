//! What can be explored.

use std::fmt::Debug;
use std::hash::Hash;

/// Something with states and steps between them.
pub(crate) trait World: Clone + Hash {
    type Step: Debug;

    /// The steps that are possible now, always in the same order.
    fn steps(&self) -> Vec<Self::Step>;

    /// Takes a step.
    ///
    /// # Errors
    /// A property does not hold.
    fn take(&mut self, step: &Self::Step) -> Result<(), String>;

    /// Whether the step happens in the end if it stays possible. Others (cuts, resets) may never happen.
    fn is_certain(step: &Self::Step) -> bool;

    /// Whether all is over, and nothing is left.
    fn is_done(&self) -> bool;
}
