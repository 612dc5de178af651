//! The built-in function: Fibonacci numbers, exact for any n.

use num_bigint::BigUint;

/// The largest n whose fib(n) fits into 64 bits.
const MAX_N_IN_U64: u64 = 93;

/// Returns fib(n), where fib(0) = 0, fib(1) = 1 and fib(n) = fib(n-1) + fib(n-2).
///
/// Above 64 bits it uses fast doubling: it goes through the bits of n, and computes from fib(k) and
/// fib(k-1)
///
/// ```text
/// fib(2k-1) = fib(k)² + fib(k-1)²
/// fib(2k+1) = 4 fib(k)² - fib(k-1)² + 2 (-1)^k
/// fib(2k)   = fib(2k+1) - fib(2k-1)
/// ```
///
/// with two squarings for each bit. The last bit needs only one of the three numbers, by a single
/// multiplication:
///
/// ```text
/// fib(2k)   = fib(k) (fib(k) + 2 fib(k-1))
/// fib(2k+1) = (2 fib(k) + fib(k-1)) (2 fib(k) - fib(k-1)) + 2 (-1)^k
/// ```
///
/// The algorithm is from the [GMP manual](https://gmplib.org/manual/Fibonacci-Numbers-Algorithm).
pub fn fib(n: u64) -> BigUint {
    if n <= MAX_N_IN_U64 {
        return fib_u64(n).into();
    }
    let bits = u64::BITS - n.leading_zeros();
    // fib(k), fib(k-1).
    let mut current = BigUint::from(1u32);
    let mut previous = BigUint::from(0u32);
    let mut k_is_odd = true; // k = 1
    for bit in (1..bits - 1).rev() {
        let square = &current * &current;
        let previous_square = &previous * &previous;
        let lower = &square + &previous_square; // fib(2k-1)
        let upper = add_alternating_2((square << 2u32) - previous_square, k_is_odd); // fib(2k+1)
        let middle = &upper - &lower; // fib(2k)
        k_is_odd = n >> bit & 1 == 1;
        (current, previous) = if k_is_odd {
            (upper, middle)
        } else {
            (middle, lower)
        };
    }
    if n.is_multiple_of(2) {
        let sum = (previous << 1u32) + &current;
        current * sum
    } else {
        let double = current << 1u32;
        add_alternating_2((&double + &previous) * (double - previous), k_is_odd)
    }
}

/// Adds 2 (-1)^k.
fn add_alternating_2(number: BigUint, k_is_odd: bool) -> BigUint {
    if k_is_odd {
        number - 2u32
    } else {
        number + 2u32
    }
}

fn fib_u64(n: u64) -> u64 {
    let mut current = 0u64;
    let mut next = 1u64;
    for _ in 0..n {
        (current, next) = (next, current.wrapping_add(next)); // only the last `next` overflows
    }
    current
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn small_numbers_match_the_definition() {
        let mut current = BigUint::from(0u32);
        let mut next = BigUint::from(1u32);
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
        // The code does not use this identity.
        #[test]
        fn fib_of_a_sum_matches_the_addition_identity(m in 1u64..20_000, n in 0u64..20_000) {
            prop_assert_eq!(fib(m + n), fib(m) * fib(n + 1) + fib(m - 1) * fib(n));
        }
    }
}
