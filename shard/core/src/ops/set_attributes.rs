//! SetAttributes: of a directory, file or symlink. Contents never change.

use eggs_machine::Table;
use eggs_proto::limits::{XATTR_BYTES_MAX, XATTR_NAME_BYTES_MAX};
use eggs_proto::{ServiceError, ShardError, pb};

use crate::context::{Answer, Context, done, permissions};
use crate::schema;

pub(crate) fn apply<T: Table + ?Sized>(context: &mut Context<'_, '_, T>, op: pb::SetAttributes) -> Answer {
    let inode = context.local(op.inode)?;
    if inode.is_directory() {
        let (_, mut row) = context.directory(op.inode)?;
        change_xattrs(&mut row.xattrs, &op)?;
        set(&mut row.mode, op.mode.map(permissions));
        set(&mut row.uid, op.uid);
        set(&mut row.gid, op.gid);
        set(&mut row.mtime, op.mtime);
        set(&mut row.atime, op.atime);
        context.put(schema::directory_key(inode), &row)?;
    } else {
        let key = schema::file_key(inode);
        let row: Option<pb::FileRow> = schema::get(&*context.tx, &key)?;
        let mut row = row.ok_or_else(|| ShardError::NotFound.with(format_args!("inode {inode}")))?;
        change_xattrs(&mut row.xattrs, &op)?;
        set(&mut row.mode, op.mode.map(permissions));
        set(&mut row.uid, op.uid);
        set(&mut row.gid, op.gid);
        set(&mut row.mtime, op.mtime);
        set(&mut row.atime, op.atime);
        context.put(key, &row)?;
    }
    done()
}

fn set<V>(field: &mut V, value: Option<V>) {
    if let Some(value) = value {
        *field = value;
    }
}

/// Removes, then sets. They stay sorted by name.
fn change_xattrs(xattrs: &mut Vec<pb::ExtendedAttribute>, op: &pb::SetAttributes) -> Result<(), pb::Error> {
    for name in &op.remove_xattrs {
        let at = xattrs
            .binary_search_by(|xattr| xattr.name.cmp(name))
            .map_err(|_| ShardError::NoAttribute.with(name.escape_ascii()))?;
        xattrs.remove(at);
    }
    for new in &op.set_xattrs {
        if new.name.is_empty() || new.name.len() > XATTR_NAME_BYTES_MAX || new.name.contains(&0) {
            return Err(ShardError::InvalidName.with("extended attribute"));
        }
        match xattrs.binary_search_by(|xattr| xattr.name.cmp(&new.name)) {
            Ok(at) => xattrs[at].value = new.value.clone(),
            Err(at) => xattrs.insert(at, new.clone()),
        }
        let bytes: usize = xattrs.iter().map(|xattr| xattr.name.len() + xattr.value.len()).sum();
        if bytes > XATTR_BYTES_MAX {
            return Err(ShardError::TooLarge.with("extended attributes"));
        }
    }
    Ok(())
}
