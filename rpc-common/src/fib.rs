//! The built-in function: Fibonacci numbers, exact for any n, and the form of n.

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

/// Number of digits of the largest 64-bit number.
const MAX_DIGITS: usize = 20;

/// The reason why a text is not a number. The messages complete "'abc' is …".
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NumberError {
    /// The text does not match `[0-9]{1,20}`.
    #[error("not a whole number (digits only, such as 30)")]
    Malformed,
    /// The number is larger than 2^64 - 1.
    #[error("too large (at most {})", u64::MAX)]
    TooLarge,
}

/// Parses a number of the form `[0-9]{1,20}`: no sign, no blanks, ASCII digits only. Of a longer
/// text it looks only at the length.
///
/// # Errors
/// [`NumberError`]
pub fn parse_number(text: &[u8]) -> Result<u64, NumberError> {
    if text.is_empty() || text.len() > MAX_DIGITS || !text.iter().all(u8::is_ascii_digit) {
        return Err(NumberError::Malformed);
    }
    let digits = std::str::from_utf8(text).map_err(|_| NumberError::Malformed)?;
    digits.parse().map_err(|_| NumberError::TooLarge)
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

    #[test]
    fn numbers_have_1_to_20_ascii_digits() {
        assert_eq!(parse_number(b"0"), Ok(0));
        assert_eq!(parse_number(b"007"), Ok(7));
        assert_eq!(parse_number(b"18446744073709551615"), Ok(u64::MAX));
        assert_eq!(
            parse_number(b"18446744073709551616"),
            Err(NumberError::TooLarge)
        );
        for text in [
            "", " 1", "1 ", "1\n", "+1", "-1", "1.0", "1e3", "0x1f", "٣", "１", "abc",
        ] {
            assert_eq!(
                parse_number(text.as_bytes()),
                Err(NumberError::Malformed),
                "{text:?}"
            );
        }
        assert_eq!(parse_number(&[b'0'; 21]), Err(NumberError::Malformed));
    }

    proptest! {
        #[test]
        fn every_64_bit_number_is_parsed(n: u64) {
            prop_assert_eq!(parse_number(n.to_string().as_bytes()), Ok(n));
        }

        // The code does not use this identity.
        #[test]
        fn fib_of_a_sum_matches_the_addition_identity(m in 1u64..20_000, n in 0u64..20_000) {
            prop_assert_eq!(fib(m + n), fib(m) * fib(n + 1) + fib(m - 1) * fib(n));
        }
    }
}
