//! The basic encodings of AMQP 0-9-1 (4.2.5): integers and strings. Pure.

use thiserror::Error;

/// **Malformed** bytes do not fit into what holds them, or have an unknown type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("malformed AMQP")]
pub struct Malformed;

/// A **reader** takes values off the front of some bytes.
#[derive(Clone, Copy, Debug)]
pub struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    /// Takes `len` bytes.
    ///
    /// # Errors
    /// [`Malformed`] if fewer are left, as for all methods.
    pub fn bytes(&mut self, len: usize) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or(Malformed)?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const LEN: usize>(&mut self) -> Result<[u8; LEN], Malformed> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(Malformed)?;
        self.0 = rest;
        Ok(*taken)
    }

    /// Takes an octet.
    ///
    /// # Errors
    /// [`Malformed`]
    pub fn octet(&mut self) -> Result<u8, Malformed> {
        self.array().map(u8::from_be_bytes)
    }

    /// Takes an integer of 2 bytes.
    ///
    /// # Errors
    /// [`Malformed`]
    pub fn short(&mut self) -> Result<u16, Malformed> {
        self.array().map(u16::from_be_bytes)
    }

    /// Takes an integer of 4 bytes.
    ///
    /// # Errors
    /// [`Malformed`]
    pub fn long(&mut self) -> Result<u32, Malformed> {
        self.array().map(u32::from_be_bytes)
    }

    /// Takes an integer of 8 bytes.
    ///
    /// # Errors
    /// [`Malformed`]
    pub fn long_long(&mut self) -> Result<u64, Malformed> {
        self.array().map(u64::from_be_bytes)
    }

    /// Takes a short string: a length of 1 byte, then the bytes.
    ///
    /// # Errors
    /// [`Malformed`]
    pub fn short_string(&mut self) -> Result<&'a [u8], Malformed> {
        let len = self.octet()?;
        self.bytes(len.into())
    }

    /// Takes a long string, or the content of a table or an array: a length of 4 bytes, then the
    /// bytes.
    ///
    /// # Errors
    /// [`Malformed`]
    pub fn long_string(&mut self) -> Result<&'a [u8], Malformed> {
        let len = self.long()?;
        self.bytes(usize::try_from(len).map_err(|_| Malformed)?)
    }
}

/// Appends a short string. Bytes beyond 255 are left out: the options of both programs allow no
/// longer one.
pub fn put_short_string(to: &mut Vec<u8>, bytes: &[u8]) {
    let len = u8::try_from(bytes.len()).unwrap_or(u8::MAX);
    to.push(len);
    to.extend_from_slice(&bytes[..len.into()]);
}

/// Appends a long string, or the content of a table or an array.
///
/// # Panics
/// If it has 4 GiB or more.
pub fn put_long_string(to: &mut Vec<u8>, bytes: &[u8]) {
    let len = u32::try_from(bytes.len()).expect("it is shorter than 4 GiB");
    to.extend_from_slice(&len.to_be_bytes());
    to.extend_from_slice(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_taken_in_order_and_a_missing_byte_is_malformed() {
        let bytes = [
            1, 0, 2, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 4, 2, b'a', b'b', 0, 0, 0, 1, b'c',
        ];
        let mut reader = Reader(&bytes);
        assert_eq!(
            (
                reader.octet(),
                reader.short(),
                reader.long(),
                reader.long_long()
            ),
            (Ok(1), Ok(2), Ok(3), Ok(4))
        );
        assert_eq!(
            (reader.short_string(), reader.long_string()),
            (Ok(&b"ab"[..]), Ok(&b"c"[..]))
        );
        assert_eq!(reader.octet(), Err(Malformed));
        for len in 0..4 {
            assert_eq!(Reader(&[0, 0, 0, 9][..len]).long(), Err(Malformed));
        }
        assert_eq!(Reader(&[2, b'a']).short_string(), Err(Malformed));
        assert_eq!(
            Reader(&[0xff, 0xff, 0xff, 0xff, 0]).long_string(),
            Err(Malformed)
        );
    }

    #[test]
    fn a_string_is_read_as_it_was_written() {
        let mut bytes = Vec::new();
        put_short_string(&mut bytes, &[7; 255]);
        put_long_string(&mut bytes, &[8; 300]);
        let mut reader = Reader(&bytes);
        assert_eq!(
            (reader.short_string(), reader.long_string()),
            (Ok(&[7; 255][..]), Ok(&[8; 300][..]))
        );
        let mut cut = Vec::new();
        put_short_string(&mut cut, &[7; 256]);
        assert_eq!(Reader(&cut).short_string(), Ok(&[7; 255][..]));
    }
}
