//! What an operation has in hand while it is applied.

use eggs_machine::{Table, TableError, Tx};
use eggs_proto::{
    BlockId, InodeId, InodeType, ServiceError, ShardError, ShardId, Time, TransactionId, names, pb,
};
use prost::Message;

use crate::schema;

/// Why an operation does not come to its end.
#[derive(Debug)]
pub(crate) enum Stop {
    /// An answer. It must come before the operation's first write (SH-11).
    Refused(pb::Error),
    /// The replica stops.
    Failed(TableError),
}

impl From<ShardError> for Stop {
    fn from(error: ShardError) -> Self {
        Stop::Refused(error.bare())
    }
}

impl From<pb::Error> for Stop {
    fn from(error: pb::Error) -> Self {
        Stop::Refused(error)
    }
}

impl From<TableError> for Stop {
    fn from(error: TableError) -> Self {
        Stop::Failed(error)
    }
}

pub(crate) type Answer = Result<pb::write_result::Result, Stop>;

pub(crate) fn done() -> Answer {
    Ok(pb::write_result::Result::Done(pb::Done {}))
}

/// One operation being applied at its own instant.
pub(crate) struct Context<'c, 't, T: Table + ?Sized> {
    pub shard: ShardId,
    pub time: Time,
    pub tx: &'c mut Tx<'t, T>,
    /// The M row, read once per command and written back once.
    meta: Option<Meta>,
}

struct Meta {
    row: pb::ShardMetaRow,
    changed: bool,
}

impl<'c, 't, T: Table + ?Sized> Context<'c, 't, T> {
    pub fn new(shard: ShardId, time: Time, tx: &'c mut Tx<'t, T>) -> Self {
        Context { shard, time, tx, meta: None }
    }

    pub fn meta(&mut self) -> Result<&pb::ShardMetaRow, TableError> {
        Ok(&self.load_meta()?.row)
    }

    pub fn change_meta(&mut self) -> Result<&mut pb::ShardMetaRow, TableError> {
        let meta = self.load_meta()?;
        meta.changed = true;
        Ok(&mut meta.row)
    }

    fn load_meta(&mut self) -> Result<&mut Meta, TableError> {
        if self.meta.is_none() {
            let row = read_meta(&*self.tx)?;
            self.meta = Some(Meta { row, changed: false });
        }
        self.meta.as_mut().ok_or_else(|| TableError("the meta row was not read".to_owned()))
    }

    /// Ends a command.
    pub fn finish(self) -> Result<(), TableError> {
        match self.meta {
            Some(Meta { row, changed: true }) => self.tx.put(schema::META_KEY, row.encode_to_vec()),
            _ => Ok(()),
        }
    }

    pub fn put(&mut self, key: Vec<u8>, row: &impl Message) -> Result<(), TableError> {
        self.tx.put(key, row.encode_to_vec())
    }

    /// The next inode id of a kind. Takes it: call it when nothing can be refused any more.
    pub fn new_inode(&mut self, kind: InodeType) -> Result<InodeId, Stop> {
        let shard = self.shard;
        let meta = self.change_meta()?;
        let counter = match kind {
            InodeType::Directory => &mut meta.next_directory,
            InodeType::File => &mut meta.next_file,
            InodeType::Symlink => &mut meta.next_symlink,
        };
        if *counter > InodeId::COUNTER_MAX {
            return Err(ShardError::Internal.with("no inode numbers are left").into());
        }
        let id = InodeId::new(kind, shard, *counter);
        *counter += 1;
        Ok(id)
    }

    pub fn new_block(&mut self) -> Result<BlockId, Stop> {
        let shard = self.shard;
        let meta = self.change_meta()?;
        if meta.next_block >= 1 << 56 {
            return Err(ShardError::Internal.with("no block numbers are left").into());
        }
        let id = BlockId::new(shard, meta.next_block);
        meta.next_block += 1;
        Ok(id)
    }

    /// The id as one of this shard's inodes.
    pub fn local(&self, id: u64) -> Result<InodeId, Stop> {
        Ok(local(self.shard, id)?)
    }

    /// A directory of this shard that is not removed, nor about to be.
    pub fn directory(&self, id: u64) -> Result<(InodeId, pb::DirectoryRow), Stop> {
        self.directory_for(id, TransactionId(0))
    }

    /// As [`Context::directory`]; `transaction` may hold its lock.
    pub fn directory_for(
        &self,
        id: u64,
        transaction: TransactionId,
    ) -> Result<(InodeId, pb::DirectoryRow), Stop> {
        let id = local_directory(self.shard, id)?;
        let row: Option<pb::DirectoryRow> = schema::get(&*self.tx, &schema::directory_key(id))?;
        match row {
            Some(row) if row.transaction != 0 && row.transaction != transaction.0 => {
                Err(ShardError::Locked.with(format_args!("directory {id} is being removed")).into())
            }
            Some(row) if row.owner != 0 => Ok((id, row)),
            _ => Err(ShardError::NotFound.with(format_args!("directory {id}")).into()),
        }
    }

    /// Writes back a directory whose entries have changed now.
    pub fn touch(&mut self, id: InodeId, mut row: pb::DirectoryRow) -> Result<(), TableError> {
        row.mtime = self.time.0;
        self.put(schema::directory_key(id), &row)
    }
}

pub(crate) fn read_meta<T: Table + ?Sized>(table: &T) -> Result<pb::ShardMetaRow, TableError> {
    Ok(schema::get(table, schema::META_KEY)?.unwrap_or(FIRST_META))
}

/// Counter 0 is the null id's or the root's.
const FIRST_META: pb::ShardMetaRow = pb::ShardMetaRow {
    next_directory: 1,
    next_file: 1,
    next_symlink: 1,
    next_block: 1,
    expire_after: 0,
    transactions_floor: 0,
};

pub(crate) fn local(shard: ShardId, id: u64) -> Result<InodeId, pb::Error> {
    let id = InodeId(id);
    if id.is_null() || id.kind().is_none() {
        return Err(ShardError::Malformed.with(format_args!("inode {id}")));
    }
    if id.shard() != shard {
        return Err(ShardError::Malformed.with(format_args!("inode {id} is not of shard {shard}")));
    }
    Ok(id)
}

pub(crate) fn local_directory(shard: ShardId, id: u64) -> Result<InodeId, pb::Error> {
    let id = local(shard, id)?;
    if !id.is_directory() {
        return Err(ShardError::NotDirectory.with(format_args!("inode {id}")));
    }
    Ok(id)
}

/// The error for a name that cannot be one.
pub(crate) fn check_name(name: &[u8]) -> Result<(), pb::Error> {
    names::validate(name).map_err(|error| match error {
        names::NameError::TooLong => ShardError::NameTooLong.bare(),
        error => ShardError::InvalidName.with(error),
    })
}

/// Permission bits; the type is in the inode id.
pub(crate) fn permissions(mode: u32) -> u32 {
    mode & 0o7777
}
