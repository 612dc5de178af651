//! The function that is served: Fibonacci numbers, exact for any n.

use num_bigint::BigUint;

/// The largest n whose fib(n) fits into 64 bits.
const LARGEST_IN_U64: u64 = 93;

/// Returns fib(n), where fib(0) = 0, fib(1) = 1 and fib(n) = fib(n-1) + fib(n-2).
///
/// Beyond what 64 bits hold it doubles fast: with the pair fib(k), fib(k-1) at hand,
///
/// ```text
/// fib(2k-1) = fib(k)² + fib(k-1)²
/// fib(2k+1) = 4 fib(k)² - fib(k-1)² + 2 (-1)^k
/// fib(2k)   = fib(2k+1) - fib(2k-1)
/// ```
///
/// so each bit of n costs two squarings, and the last one a single multiplication, because no pair
/// is needed any more. The identities follow from d'Ocagne's and Cassini's; the method is that of
/// the [GMP manual](https://gmplib.org/manual/Fibonacci-Numbers-Algorithm).
#[must_use]
pub fn fib(n: u64) -> BigUint {
    if n <= LARGEST_IN_U64 {
        return small(n).into();
    }
    let bits = u64::BITS - n.leading_zeros();
    let (mut at_k, mut before_k) = (BigUint::from(1u32), BigUint::from(0u32)); // k = 1
    let mut k_is_odd = true;
    for bit in (1..bits - 1).rev() {
        let (square, square_before) = (&at_k * &at_k, &before_k * &before_k);
        let low = &square + &square_before;
        let high = plus_cassini((square << 2u32) - square_before, k_is_odd);
        let middle = &high - &low;
        k_is_odd = n >> bit & 1 == 1;
        (at_k, before_k) = if k_is_odd { (high, middle) } else { (middle, low) };
    }
    if n.is_multiple_of(2) {
        let lucas = (before_k << 1u32) + &at_k;
        at_k * lucas
    } else {
        let twice = at_k << 1u32;
        plus_cassini((&twice + &before_k) * (twice - before_k), k_is_odd)
    }
}

/// Adds 2 (-1)^k.
fn plus_cassini(number: BigUint, k_is_odd: bool) -> BigUint {
    if k_is_odd {
        number - 2u32
    } else {
        number + 2u32
    }
}

fn small(n: u64) -> u64 {
    let (mut current, mut next) = (0u64, 1u64);
    for _ in 0..n {
        (current, next) = (next, current.wrapping_add(next)); // only `next` overflows, at the end
    }
    current
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn agrees_with_the_definition() {
        let (mut current, mut next) = (BigUint::from(0u32), BigUint::from(1u32));
        for n in 0..2_000 {
            assert_eq!(fib(n), current, "fib({n})");
            (current, next) = (next.clone(), current + next);
        }
    }

    #[test]
    fn known_values_are_exact() {
        assert_eq!(fib(30).to_string(), "832040");
        assert_eq!(fib(93).to_string(), "12200160415121876738");
        assert_eq!(fib(94).to_string(), "19740274219868223167");
        let million = fib(1_000_000).to_string();
        assert_eq!(million.len(), 208_988);
        assert!(million.starts_with("19532821287077577316"));
        assert!(million.ends_with("68996526838242546875"));
    }

    proptest! {
        /// fib(m+n) = fib(m) fib(n+1) + fib(m-1) fib(n), an identity the code does not use.
        #[test]
        fn adds_up(m in 1u64..20_000, n in 0u64..20_000) {
            prop_assert_eq!(fib(m + n), fib(m) * fib(n + 1) + fib(m - 1) * fib(n));
        }
    }
}
