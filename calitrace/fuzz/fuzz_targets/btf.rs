//! BTF. Offsets are those of members, and what a module adds comes behind what the kernel has.
#![no_main]

use calitrace::kernel::btf::Btf;
use libfuzzer_sys::fuzz_target;

/// Names that occur in the seeds.
const STRUCTURES: [&str; 4] = ["outer", "inner", "colour", "callback_t"];
const PATHS: [&[&str]; 5] = [&["first"], &["inside"], &["named"], &["named", "deep"], &["bits"]];

fn answers(btf: &Btf) -> Vec<String> {
    let mut answers = Vec::new();
    for structure in STRUCTURES {
        for path in PATHS {
            let (member, offset) = (btf.member(structure, path), btf.offset(structure, path));
            if let Some(offset) = offset {
                let member = member.expect("what has an offset is a member");
                assert_eq!((offset.checked_mul(8), 0), (Some(member.bit_offset), member.bits));
            }
            answers.push(format!("{member:?} {offset:?}"));
        }
        answers.push(format!(
            "{:?} {:?} {:?}",
            btf.size(structure),
            btf.enum_values(structure),
            btf.parameters(structure)
        ));
    }
    answers
}

fuzz_target!(|data: &[u8]| {
    let Ok(btf) = Btf::parse(data.to_vec()) else {
        return;
    };
    let told = answers(&btf);
    let empty = [
        &0xeb9f_u16.to_ne_bytes()[..],
        &[1, 0],
        &24_u32.to_ne_bytes(),
        &[0; 16],
    ]
    .concat();
    let same = btf.with_module(&empty).expect("it has nothing to add");
    assert_eq!((same.len(), answers(&same)), (btf.len(), told));
    if let Ok(both) = btf.with_module(data) {
        assert_eq!(both.len(), 2 * btf.len());
        let _ = answers(&both);
    }
});
