//! A reader of BTF, the kernel's description of its own types: member offsets, enum values and function prototypes.
//!
//! Pure: bytes in, answers out. Knows nothing of what the answers are used for. The layout is that of
//! include/uapi/linux/btf.h (Linux 6.18); every kind up to `BTF_KIND_ENUM64` is understood.

use std::{fmt, ops::Range};

/// Why bytes are not BTF that can be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BtfError {
    /// There are no bytes.
    Empty,
    /// They do not begin with BTF's magic number in this machine's byte order.
    Magic,
    /// They end within the named part.
    Truncated(&'static str),
    /// A type of a kind that this reader does not know, so that all behind it is out of reach.
    Kind(u32),
}

impl fmt::Display for BtfError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("it is empty"),
            Self::Magic => f.write_str("it is not BTF of this machine's byte order"),
            Self::Truncated(part) => write!(f, "it ends within the {part}"),
            Self::Kind(kind) => write!(f, "it has types of the unknown kind {kind}"),
        }
    }
}

impl std::error::Error for BtfError {}

const MAGIC: u16 = 0xeb9f;

const KIND_PTR: u32 = 2;
const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
const KIND_ENUM: u32 = 6;
const KIND_TYPEDEF: u32 = 8;
const KIND_VOLATILE: u32 = 9;
const KIND_CONST: u32 = 10;
const KIND_RESTRICT: u32 = 11;
const KIND_FUNC_PROTO: u32 = 13;
const KIND_TYPE_TAG: u32 = 18;
const KIND_ENUM64: u32 = 19;

/// Longest chain of typedefs, and deepest nest of anonymous structures, that is followed: garbage may be circular.
const DEPTH: usize = 32;

/// Parsed BTF.
#[derive(Debug)]
pub struct Btf {
    data: Vec<u8>,
    strings: Range<usize>,
    /// Where type `index + 1` begins in `data`; type 0 is `void`.
    types: Vec<u32>,
}

/// A type's fixed part.
#[derive(Clone, Copy)]
struct Type {
    name: u32,
    kind: u32,
    length: usize,
    /// Members of a structure say whether they are bit-fields.
    flag: bool,
    /// The type referred to; of others the size in bytes.
    refers_to: u32,
    /// Where what follows the fixed part begins in the data.
    rest: usize,
}

/// Where a member lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Bits from the start of the outer structure.
    pub bit_offset: u32,
    /// Bits, if it is a bit-field; else 0.
    pub bits: u32,
    type_id: u32,
}

impl Btf {
    /// Parses raw BTF (`/sys/kernel/btf/vmlinux`).
    pub fn parse(data: Vec<u8>) -> Result<Self, BtfError> {
        let (types, strings) = parts(&data)?;
        let mut starts = Vec::new();
        let mut at = types.start;
        while at < types.end {
            let start = u32::try_from(at).map_err(|_too_large| BtfError::Truncated("types"))?;
            let found = read_type(&data, at).ok_or(BtfError::Truncated("types"))?;
            at = found.rest + trailing(found.kind, found.length).ok_or(BtfError::Kind(found.kind))?;
            if at > types.end {
                return Err(BtfError::Truncated("types"));
            }
            starts.push(start);
        }
        Ok(Self {
            data,
            strings,
            types: starts,
        })
    }

    /// This and a module's own BTF (`/sys/kernel/btf/MODULE`), whose types and strings continue this one's numbering
    /// ("split BTF", `btf_parse_module` in kernel/bpf/btf.c, Linux 5.11).
    pub fn with_module(&self, module: &[u8]) -> Result<Self, BtfError> {
        let (own, base) = (parts(module)?, parts(&self.data)?);
        let parts = [
            &self.data[base.0],
            &module[own.0],
            &self.data[base.1],
            &module[own.1],
        ];
        let length = |parts: &[&[u8]]| {
            u32::try_from(parts.iter().map(|part| part.len()).sum::<usize>())
                .map_err(|_too_large| BtfError::Truncated("types"))
        };
        let (types, strings) = (length(&parts[..2])?, length(&parts[2..])?);
        let mut data = self.data[..8].to_vec();
        data[4..8].copy_from_slice(&24_u32.to_ne_bytes());
        for word in [0, types, types, strings] {
            data.extend_from_slice(&u32::to_ne_bytes(word));
        }
        for part in parts {
            data.extend_from_slice(part);
        }
        Self::parse(data)
    }

    /// Offset in bytes of a member of a structure. `path` leads from structure to structure; anonymous ones in
    /// between are looked through. `None` if there is none of that name, or it is a bit-field.
    pub fn offset(&self, structure: &str, path: &[&str]) -> Option<u32> {
        let member = self.member(structure, path)?;
        (member.bits == 0 && member.bit_offset % 8 == 0).then_some(member.bit_offset / 8)
    }

    /// Where a member of a structure lies; see [`Self::offset`].
    pub fn member(&self, structure: &str, path: &[&str]) -> Option<Member> {
        let mut id = self.find(structure, &[KIND_STRUCT, KIND_UNION])?;
        let mut total = 0_u32;
        let mut last = None;
        for name in path {
            let found = self.member_of(self.resolve(id)?, name, DEPTH)?;
            total = total.checked_add(found.bit_offset)?;
            id = found.type_id;
            last = Some(Member {
                bit_offset: total,
                ..found
            });
        }
        last
    }

    /// Size in bytes of a structure or union.
    pub fn size(&self, structure: &str) -> Option<u32> {
        let found = self.get(self.find(structure, &[KIND_STRUCT, KIND_UNION])?)?;
        Some(found.refers_to)
    }

    /// The constants of an enum, in order, with the values cut to 32 bits.
    pub fn enum_values(&self, name: &str) -> Option<Vec<(u32, &str)>> {
        let id = self.find(name, &[KIND_ENUM, KIND_ENUM64])?;
        let found = self.get(id)?;
        let size = if found.kind == KIND_ENUM { 8 } else { 12 };
        (0..found.length)
            .map(|index| {
                let at = found.rest + index * size;
                Some((word(&self.data, at + 4)?, self.string(word(&self.data, at)?)?))
            })
            .collect()
    }

    /// Number of parameters of the function type that a typedef of a function pointer names.
    pub fn parameters(&self, typedef: &str) -> Option<usize> {
        let id = self.find(typedef, &[KIND_TYPEDEF])?;
        let pointer = self.get(self.resolve(id)?)?;
        let function = self.get(self.resolve((pointer.kind == KIND_PTR).then_some(pointer.refers_to)?)?)?;
        (function.kind == KIND_FUNC_PROTO).then_some(function.length)
    }

    /// Number of types, `void` left out.
    pub fn len(&self) -> usize {
        self.types.len()
    }

    /// Whether there are no types.
    pub fn is_empty(&self) -> bool {
        self.types.is_empty()
    }

    fn get(&self, id: u32) -> Option<Type> {
        let at = *self.types.get((id as usize).checked_sub(1)?)?;
        read_type(&self.data, at as usize)
    }

    /// The first type of this name that is of one of the kinds.
    fn find(&self, name: &str, kinds: &[u32]) -> Option<u32> {
        let index = self.types.iter().position(|&at| {
            read_type(&self.data, at as usize)
                .is_some_and(|found| kinds.contains(&found.kind) && self.string(found.name) == Some(name))
        })?;
        u32::try_from(index + 1).ok()
    }

    /// Looks through typedefs and qualifiers.
    fn resolve(&self, mut id: u32) -> Option<u32> {
        for _ in 0..DEPTH {
            let found = self.get(id)?;
            match found.kind {
                KIND_TYPEDEF | KIND_VOLATILE | KIND_CONST | KIND_RESTRICT | KIND_TYPE_TAG => {
                    id = found.refers_to;
                }
                _ => return Some(id),
            }
        }
        None
    }

    fn member_of(&self, id: u32, name: &str, depth: usize) -> Option<Member> {
        let outer = self.get(id)?;
        if !matches!(outer.kind, KIND_STRUCT | KIND_UNION) || depth == 0 {
            return None;
        }
        for index in 0..outer.length {
            let at = outer.rest + index * 12;
            let (member_name, type_id) = (word(&self.data, at)?, word(&self.data, at + 4)?);
            let placed = word(&self.data, at + 8)?;
            let (bit_offset, bits) = if outer.flag {
                (placed & 0x00ff_ffff, placed >> 24)
            } else {
                (placed, 0)
            };
            if member_name != 0 {
                if self.string(member_name) == Some(name) {
                    return Some(Member {
                        bit_offset,
                        bits,
                        type_id,
                    });
                }
            } else if let Some(inner) = self
                .resolve(type_id)
                .and_then(|id| self.member_of(id, name, depth - 1))
            {
                return Some(Member {
                    bit_offset: bit_offset.checked_add(inner.bit_offset)?,
                    ..inner
                });
            }
        }
        None
    }

    fn string(&self, offset: u32) -> Option<&str> {
        let bytes = self.data.get(self.strings.clone())?.get(offset as usize..)?;
        let end = bytes.iter().position(|&byte| byte == 0)?;
        std::str::from_utf8(&bytes[..end]).ok()
    }
}

/// Where the types and the strings lie.
fn parts(data: &[u8]) -> Result<(Range<usize>, Range<usize>), BtfError> {
    if data.is_empty() {
        return Err(BtfError::Empty);
    }
    let header = |at: usize| word(data, at).ok_or(BtfError::Truncated("header"));
    if header(0)?.to_ne_bytes()[..2] != MAGIC.to_ne_bytes() {
        return Err(BtfError::Magic);
    }
    let body = header(4)? as usize;
    let part = |offset: u32, length: u32, name| {
        let start = body.saturating_add(offset as usize);
        let end = start.saturating_add(length as usize);
        if end <= data.len() {
            Ok(start..end)
        } else {
            Err(BtfError::Truncated(name))
        }
    };
    Ok((
        part(header(8)?, header(12)?, "types")?,
        part(header(16)?, header(20)?, "strings")?,
    ))
}

fn word(data: &[u8], at: usize) -> Option<u32> {
    let bytes = data.get(at..at.checked_add(4)?)?;
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

fn read_type(data: &[u8], at: usize) -> Option<Type> {
    let info = word(data, at + 4)?;
    Some(Type {
        name: word(data, at)?,
        kind: info >> 24 & 0x1f,
        length: (info & 0xffff) as usize,
        flag: info >> 31 == 1,
        refers_to: word(data, at + 8)?,
        rest: at + 12,
    })
}

/// Bytes behind the fixed part of a type; `None` for an unknown kind.
fn trailing(kind: u32, length: usize) -> Option<usize> {
    Some(match kind {
        // Pointers, forward declarations, typedefs, qualifiers, functions, floats, type tags.
        KIND_PTR | 7..=12 | 16 | KIND_TYPE_TAG => 0,
        // Integers, variables, declaration tags.
        1 | 14 | 17 => 4,
        // Arrays.
        3 => 12,
        KIND_STRUCT | KIND_UNION | KIND_ENUM64 | 15 => length * 12,
        KIND_ENUM | KIND_FUNC_PROTO => length * 8,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Writes BTF for the tests.
    #[derive(Default)]
    struct Writer {
        types: Vec<u8>,
        strings: Vec<u8>,
    }

    impl Writer {
        fn new() -> Self {
            Self {
                types: Vec::new(),
                strings: vec![0],
            }
        }

        fn name(&mut self, name: &str) -> u32 {
            if name.is_empty() {
                return 0;
            }
            let offset = u32::try_from(self.strings.len()).unwrap();
            self.strings.extend_from_slice(name.as_bytes());
            self.strings.push(0);
            offset
        }

        fn ty(&mut self, name: &str, info: u32, refers_to: u32, rest: &[u32]) {
            let name = self.name(name);
            for word in [name, info, refers_to].iter().chain(rest) {
                self.types.extend_from_slice(&word.to_ne_bytes());
            }
        }

        fn finish(self) -> Vec<u8> {
            let length = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap();
            let (types, strings) = (length(&self.types), length(&self.strings));
            let mut out = MAGIC.to_ne_bytes().to_vec();
            out.extend_from_slice(&[1, 0]);
            for word in [24, 0, types, types, strings] {
                out.extend_from_slice(&u32::to_ne_bytes(word));
            }
            out.extend_from_slice(&self.types);
            out.extend_from_slice(&self.strings);
            out
        }
    }

    /// `struct outer { int first; union { int inside; }; const inner_t named; int bits: 3; }` and friends.
    fn sample() -> Vec<u8> {
        let mut w = Writer::new();
        w.ty("int", 1 << 24, 4, &[32]); // 1
        let inside = w.name("inside");
        w.ty("", KIND_UNION << 24 | 1, 4, &[inside, 1, 0]); // 2
        let deep = w.name("deep");
        w.ty("inner", KIND_STRUCT << 24 | 1, 8, &[deep, 1, 32]); // 3
        w.ty("inner_t", KIND_TYPEDEF << 24, 3, &[]); // 4
        w.ty("", KIND_CONST << 24, 4, &[]); // 5
        let (first, named, bits) = (w.name("first"), w.name("named"), w.name("bits"));
        let members = [first, 1, 0, 0, 2, 32, named, 5, 64, bits, 1, 3 << 24 | 0x82];
        w.ty("outer", 1 << 31 | KIND_STRUCT << 24 | 4, 24, &members); // 6
        let (red, green) = (w.name("RED"), w.name("GREEN"));
        w.ty("colour", KIND_ENUM << 24 | 2, 4, &[red, 1, green, 7]); // 7
        w.ty("wide", KIND_ENUM64 << 24 | 1, 8, &[red, 9, 0]); // 8
        w.ty("", KIND_FUNC_PROTO << 24 | 2, 0, &[0, 1, 0, 1]); // 9
        w.ty("", KIND_PTR << 24, 9, &[]); // 10
        w.ty("callback_t", KIND_TYPEDEF << 24, 10, &[]); // 11
        w.ty("loop_t", KIND_TYPEDEF << 24, 12, &[]); // 12
        w.finish()
    }

    #[test]
    fn members_are_found_through_anonymous_and_typedefed_structures() {
        let btf = Btf::parse(sample()).unwrap();
        assert_eq!(btf.len(), 12);
        assert_eq!(btf.offset("outer", &["first"]), Some(0));
        assert_eq!(btf.offset("outer", &["inside"]), Some(4));
        assert_eq!(btf.offset("outer", &["named"]), Some(8));
        assert_eq!(btf.offset("outer", &["named", "deep"]), Some(12));
        assert_eq!(btf.offset("outer", &["absent"]), None);
        assert_eq!(btf.offset("absent", &["first"]), None);
        assert_eq!(btf.offset("loop_t", &["first"]), None);
    }

    #[test]
    fn a_module_continues_the_kernel_s_numbering() {
        let kernel = Btf::parse(sample()).unwrap();
        let strings = u32::try_from(kernel.strings.len()).unwrap();
        let mut w = Writer::new();
        w.strings.clear();
        let [name, member] = ["connection", "hash"].map(|name| strings + w.name(name));
        // A structure with a member of the kernel's type 3, `inner`, 8 bytes in.
        for word in [name, KIND_STRUCT << 24 | 1, 16, member, 3, 64] {
            w.types.extend_from_slice(&word.to_ne_bytes());
        }
        let both = kernel.with_module(&w.finish()).unwrap();
        assert_eq!(both.len(), 13);
        assert_eq!(both.size("connection"), Some(16));
        assert_eq!(both.offset("connection", &["hash", "deep"]), Some(12));
        assert_eq!(both.offset("outer", &["named"]), Some(8));
        assert_eq!(kernel.with_module(b"rubbish").unwrap_err(), BtfError::Magic);
    }

    #[test]
    fn a_bit_field_has_bits_and_no_byte_offset() {
        let btf = Btf::parse(sample()).unwrap();
        let bits = btf.member("outer", &["bits"]).unwrap();
        assert_eq!((bits.bit_offset, bits.bits), (130, 3));
        assert_eq!(btf.offset("outer", &["bits"]), None);
    }

    #[test]
    fn enums_of_both_widths_and_prototypes() {
        let btf = Btf::parse(sample()).unwrap();
        assert_eq!(btf.enum_values("colour"), Some(vec![(1, "RED"), (7, "GREEN")]));
        assert_eq!(btf.enum_values("wide"), Some(vec![(9, "RED")]));
        assert_eq!(btf.parameters("callback_t"), Some(2));
        assert_eq!(btf.parameters("inner_t"), None);
        assert_eq!(btf.parameters("loop_t"), None);
    }

    #[test]
    fn what_is_not_btf_is_named() {
        assert_eq!(Btf::parse(Vec::new()).unwrap_err(), BtfError::Empty);
        assert_eq!(
            Btf::parse(b"\x7fELF and more".to_vec()).unwrap_err(),
            BtfError::Magic
        );
        let mut w = Writer::new();
        w.ty("new", 31 << 24, 0, &[]);
        assert_eq!(Btf::parse(w.finish()).unwrap_err(), BtfError::Kind(31));
    }

    #[test]
    fn every_truncation_is_an_error() {
        let whole = sample();
        for length in 0..whole.len() {
            assert!(
                Btf::parse(whole[..length].to_vec()).is_err(),
                "{length} of {} bytes",
                whole.len()
            );
        }
    }

    proptest! {
        #[test]
        fn garbage_behind_a_good_header_is_survived(flips in prop::collection::vec((24_usize..400, any::<u8>()), 1..20)) {
            let mut data = sample();
            for (at, byte) in flips {
                let at = 24 + at % (data.len() - 24);
                data[at] = byte;
            }
            if let Ok(btf) = Btf::parse(data) {
                for name in ["outer", "inner", "colour", "callback_t", "loop_t"] {
                    let _: Option<u32> = btf.offset(name, &["named", "deep"]);
                    let _: Option<Vec<(u32, &str)>> = btf.enum_values(name);
                    let _: Option<usize> = btf.parameters(name);
                }
            }
        }
    }

    #[test]
    fn the_running_kernel_is_read() {
        let Ok(data) = std::fs::read("/sys/kernel/btf/vmlinux") else {
            println!("skipped: this kernel has no BTF");
            return;
        };
        let btf = Btf::parse(data).unwrap();
        // Facts of every kernel since 5.10 on 64-bit machines (include/linux/skbuff.h): `next`, `prev` and `dev` lead,
        // and `data` follows `head`.
        assert_eq!(btf.offset("sk_buff", &["next"]), Some(0));
        assert_eq!(btf.offset("sk_buff", &["dev"]), Some(16));
        let head = btf.offset("sk_buff", &["head"]).unwrap();
        assert_eq!(btf.offset("sk_buff", &["data"]), Some(head + 8));
        assert_eq!(
            btf.offset("sk_buff", &["data_len"]),
            btf.offset("sk_buff", &["len"]).map(|len| len + 4)
        );
        assert!(btf.member("sk_buff", &["cloned"]).unwrap().bits == 1);
        assert!(btf.offset("net", &["ns", "inum"]).is_some());
        assert_eq!(
            btf.enum_values("tcp_ca_state").unwrap()[1],
            (1, "TCP_CA_Disorder")
        );
        // `__data`, skb, location, and whatever the kernel has added since.
        assert!((3..=8).contains(&btf.parameters("btf_trace_kfree_skb").unwrap()));
    }
}
